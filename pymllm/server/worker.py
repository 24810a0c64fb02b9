"""One thread steps the model for all requests: new ones join those that run, and one whose client left is aborted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pymllm.api import LLM
from pymllm.engine.request import Request, RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import Session, StreamPiece

logger = logging.getLogger("pymllm")

Made = TypeVar("Made")
Item = tuple[int, StreamPiece] | Exception | None


class Busy(Exception):
    """The refusal of a request because the line is full."""


class Worker:
    """The thread that runs one model.

    max_running: how many prompts are answered together.  max_waiting: how many more may wait.
    capacity: how many there may be in all.  room: how many more may come now.
    """

    def __init__(self, llm: LLM, max_running: int, max_waiting: int) -> None:
        self.llm = llm
        if llm.generates:
            llm.engine.scheduler.max_requests = max_running
        self.capacity = self.room = max_running + max_waiting
        self._arrived: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, "generation")

    def check_room(self, prompts: int = 1) -> None:
        """Refuse with Busy if so many more prompts may not come."""
        if prompts > self.room:
            raise Busy

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place in the line for the time of a `with` block.  Busy if there is none."""
        self.check_room()
        self.room -= 1
        try:
            yield
        finally:
            self.room += 1

    def start(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], adapter: str | None = None
    ) -> Generation:
        """Take places in the line for these prompts, and start to answer them.  Busy if there are too few places.

        params: one for each prompt.
        """
        self.check_room(len(prompts))
        self.room -= len(prompts)
        generation = Generation(self, prompts, params, adapter)
        self._arrived.put(generation)
        self._thread.submit(self._work)
        return generation

    async def call(self, function: Callable[[], Made]) -> Made:
        """Call a function that uses the model, in its thread, between two steps.  Returns what it returns."""
        done: Future[Made] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except Exception as error:
                    done.set_exception(error)

        self._calls.put(run)
        self._thread.submit(self._work)
        return await asyncio.wrap_future(done)

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def _work(self) -> None:
        """Answer, in the thread, until no request is left; then release the model, which others may use as well."""
        self._run_calls()
        # They may have been answered in an earlier round.
        if self._arrived.empty():
            return
        with self.llm.session() as session:
            _Round(session, self._arrived, self._run_calls).run()


class Generation:
    """The pieces of one request, as an async iterator of (index of the prompt, piece).

    `close` aborts the request before the next step, however far it is.
    """

    def __init__(
        self,
        worker: Worker,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        adapter: str | None,
    ) -> None:
        self.worker, self.prompts, self.params, self.adapter = worker, prompts, params, adapter
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, StreamPiece]:
        item = await self._items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    async def outputs(self) -> list[RequestOutput]:
        """Wait until all prompts are answered.  Returns their outputs, in the order of the prompts."""
        finished = {index: piece.output async for index, piece in self if piece.output is not None}
        return [finished[index] for index in range(len(self.prompts))]

    def close(self) -> None:
        self.closed = True

    def deliver(self, item: tuple[int, StreamPiece]) -> None:
        """Hand a piece over; the generating thread calls this."""
        # RuntimeError: the loop has gone, and so has the client.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def leave(self, error: Exception | None = None) -> None:
        """End the pieces and free the places; the generating thread calls this once.

        error: what `__anext__` raises in place of an end.
        """

        def end() -> None:
            self.worker.room += len(self.prompts)
            self._items.put_nowait(error)

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(end)


class _Round:
    """One use of the model, from the first request until none is left.

    between: is called before each step.
    requests: the unfinished requests of each generation.  owners: the generation of each request.
    """

    def __init__(
        self, session: Session, arrived: queue.SimpleQueue[Generation], between: Callable[[], None]
    ) -> None:
        self.session, self.arrived, self.between = session, arrived, between
        self.requests: dict[Generation, list[Request]] = {}
        self.owners: dict[Request, Generation] = {}

    def run(self) -> None:
        try:
            while True:
                while not self.arrived.empty():
                    self._take(self.arrived.get())
                for generation in [generation for generation in self.requests if generation.closed]:
                    self._end(generation)
                if not self.requests:
                    return
                self.between()
                for request, piece in self.session.step():
                    self._hand_out(request, piece)
        except Exception as error:
            logger.exception("all requests under way have failed")
            for generation in list(self.requests):
                self._end(generation, error)

    def _take(self, generation: Generation) -> None:
        self.requests[generation] = []
        if generation.closed:
            return
        try:
            generation.worker.llm.check_adapter(generation.adapter)
            pairs = zip(generation.prompts, generation.params, strict=True)
            for index, (prompt, params) in enumerate(pairs):
                request = self.session.add(prompt, params, generation.adapter, index)
                self.requests[generation].append(request)
                self.owners[request] = generation
        except Exception as error:
            self._end(generation, error)

    def _hand_out(self, request: Request, piece: StreamPiece | None) -> None:
        generation = self.owners.get(request)
        # It may have been aborted within this step, after another of its prompts failed.
        if generation is None:
            return
        if piece is not None:
            generation.deliver((request.req_id, piece))
        if request.finish_reason is None:
            return
        self.requests[generation].remove(request)
        del self.owners[request]
        if request.error is not None or not self.requests[generation]:
            self._end(generation, request.error)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        for request in self.requests.pop(generation):
            del self.owners[request]
            if request in self.session.unfinished:
                self.session.abort(request)
        generation.leave(error)
