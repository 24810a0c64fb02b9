"""One thread steps the model for all requests: new ones join those that run, and one whose client left is aborted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from torch import Tensor

from pymllm.api import LLM
from pymllm.asynchronous.places import Busy, Places
from pymllm.asynchronous.pulse import Pulse, device_fault
from pymllm.asynchronous.tally import Tally
from pymllm.embedding.embedder import EmbeddingInput, EmbeddingOptions
from pymllm.engine.asking import Asked
from pymllm.engine.request import Request, RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import Session, StreamPiece
from pymllm.errors import PymllmError, RequestError

__all__ = ["REMINDER", "Busy", "Generation", "Worker"]

logger = logging.getLogger("pymllm")

# How many grammars are compiled together.
COMPILERS = 2

Made = TypeVar("Made")
Item = tuple[int, StreamPiece] | Exception | None

# What `Generation.remind_every` has a generation yield.
REMINDER = (-1, StreamPiece("", ()))


class Worker:
    """The thread that runs one model.

    max_running: how many prompts are answered together.  max_waiting: how many more may wait.
    places: the line.  live: the generations that have not ended.  refusal: what new work raises; None: it is taken.
    pulse: whether the thread is alive.  tally: what it has done.  fault: why the device runs nothing more, or None.
    checks: each says why the model cannot answer now, or None; whoever runs a part of it elsewhere adds one.
    """

    def __init__(self, llm: LLM, max_running: int, max_waiting: int) -> None:
        self.llm = llm
        if llm.generates:
            llm.engine.scheduler.max_requests = max_running
        self.places = Places(max_running + max_waiting)
        self.live: set[Generation] = set()
        self.refusal: Exception | None = None
        self.pulse, self.tally = Pulse(), Tally()
        self.fault: str | None = None
        self.checks: list[Callable[[], str | None]] = [
            llm.why_not_healthy,
            self.pulse.why_not,
            lambda: self.fault,
        ]
        self._arrived: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._asked: set[Future[Any]] = set()
        self._thread = ThreadPoolExecutor(1, "generation")
        self._compilers = ThreadPoolExecutor(COMPILERS, "grammar")
        self._last: Future[None] = Future()  # the last work of the thread

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place in the line for the time of a `with` block.  Busy if there is none."""
        self.places.take()
        try:
            yield
        finally:
            self.places.give_back()

    def start(self, asked: Sequence[Asked]) -> Generation:
        """Take places in the line for these answers, and start to make them.  Busy if there are too few places."""
        self.places.take(len(asked))
        return self.begin(asked)

    def begin(self, asked: Sequence[Asked]) -> Generation:
        """Start to make answers whose places have been taken."""
        if self.refusal is not None:
            self.places.give_back(len(asked))
        self.check_open()
        generation = Generation(self, asked)
        self.live.add(generation)
        self._arrived.put(generation)
        self._start_work()
        return generation

    def why_not_healthy(self) -> str | None:
        """Return why the model cannot answer now, or None."""
        if self.refusal is not None:
            return str(self.refusal)
        return next((reason for check in self.checks if (reason := check()) is not None), None)

    @property
    def waiting(self) -> int:
        """The number of generations that the thread has not taken in yet."""
        return self._arrived.qsize()

    async def call(self, function: Callable[[], Made]) -> Made:
        """Call a function that uses the model, in its thread, between two steps.  Returns what it returns."""
        done: Future[Made] = Future()

        def run() -> None:
            if done.cancelled():
                return
            started = self.pulse.beat()
            try:
                result = function()
            except BaseException as error:
                self.note_failure()
                fail_once(done, error)
            else:
                with contextlib.suppress(InvalidStateError):
                    done.set_result(result)
            self.pulse.note_step(started)

        self._asked.add(done)
        self._calls.put(run)
        self._start_work()
        try:
            return await asyncio.wrap_future(done)
        finally:
            self._asked.discard(done)

    async def embed(self, inputs: Sequence[EmbeddingInput], options: EmbeddingOptions) -> list[Tensor]:
        """Make the vectors of texts, [N, D] a batch; the batches take turns with the steps of others' answers."""
        embedder = self.llm.embedder
        batches = embedder.batches(inputs)
        vectors = []
        for batch in batches:
            self.check_open()
            vectors.append(await self.call(functools.partial(embedder.run, batch, options)))
        return vectors

    async def compile(self, params: SamplingParams) -> None:
        """Have the grammar of an answer compiled and kept: neither the step's thread nor other requests wait for it."""
        if params.follows is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._compilers, self.llm.grammars.start, params.follows)

    def refuse(self, error: Exception) -> None:
        """Have all work that is under way, that waits, or that is still to come raise this error."""
        self.refusal = error
        self.places.refuse_waiting(error)
        for generation in list(self.live):
            generation.abort(error)

    def lose(self, error: Exception) -> None:
        """Have all clients get this error at once, though the thread of the steps may never come back."""
        self.refuse(error)
        for generation in list(self.live):
            generation.tell(error)
        for done in list(self._asked):
            fail_once(done, error)

    def check_open(self) -> None:
        """Raise what new work raises, if anything."""
        if self.refusal is not None:
            raise self.refusal

    def shut_down(self, seconds: float = 0.0) -> bool:
        """Let the threads end once they have nothing left to do.

        seconds: how long to wait for that.  Returns whether the one that runs the model has nothing left.
        """
        with contextlib.suppress(RuntimeError):  # it has been told so before
            self._last = self._thread.submit(lambda: None)
        self._thread.shutdown(wait=False)
        self._compilers.shutdown(wait=False)
        return bool(wait([self._last], timeout=seconds).done)

    def note_failure(self) -> None:
        """See whether the device still works, after something has failed; the thread calls this."""
        self.fault = self.fault or device_fault(self.llm.embedder.runner.device)

    def _start_work(self) -> None:
        self.pulse.expect()
        self._thread.submit(self._work)

    def _run_calls(self) -> None:
        while not self._calls.empty():
            self._calls.get()()

    def _work(self) -> None:
        """Answer, in the thread, until no request is left; then release the model, which others may use as well."""
        self.pulse.beat()
        try:
            self._run_calls()
            # They may have been answered in an earlier round.
            if not self._arrived.empty():
                with self.llm.session() as session:
                    _Round(self, session, self._arrived, self._run_calls).run()
        except Exception as error:
            # The model could not be taken: nobody else would tell those who wait.
            logger.exception("no request can be answered")
            while not self._arrived.empty():
                self._arrived.get().leave(error)
        finally:
            if self._arrived.empty() and self._calls.empty():
                self.pulse.rest()


def fail_once(done: Future[Any], error: BaseException) -> None:
    """Have a future raise an error, unless it is done already."""
    with contextlib.suppress(InvalidStateError):
        done.set_exception(error)


class Generation:
    """The pieces of some answers, as an async iterator of (number of the answer, piece).

    `close` aborts the answers before the next step, however far they are.

    most_behind: how many pieces may wait to be taken; with more, the answers are aborted; None: any number.
    answered: how many tokens have come.
    """

    def __init__(self, worker: Worker, asked: Sequence[Asked]) -> None:
        self.worker, self.asked = worker, asked
        self.closed = False
        self.reason: Exception | None = None
        self.arrived_at = time.perf_counter()
        self.most_behind: int | None = None
        self.answered = 0
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()
        # The thread counts the former, the loop the latter.
        self._delivered = self._taken = 0
        self._over, self._last_taken = False, 0.0

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, StreamPiece]:
        item = await self._items.get()
        self._last_taken = self._loop.time()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        self._taken += item is not REMINDER
        return item

    def remind_every(self, seconds: float) -> None:
        """Have whoever iterates get REMINDER, too, whenever no piece has come for so long, until the end."""
        if self._over or self.closed:
            return
        now = self._loop.time()
        left = (self._last_taken or now) + seconds - now
        if left <= 0.0:
            if self._items.empty():
                self._items.put_nowait(REMINDER)
            left = seconds
        self._last_taken = self._last_taken or now
        self._loop.call_later(left, self.remind_every, seconds)

    async def outputs(self) -> list[RequestOutput]:
        """Wait until all answers are there.  Returns their outputs, in the order in which they were asked for."""
        finished = {number: piece.output async for number, piece in self if piece.output is not None}
        return [finished[number] for number in range(len(self.asked))]

    def close(self) -> None:
        self.closed = True

    def abort(self, error: Exception) -> None:
        """Close it, and have whoever waits for a piece get this error."""
        self.closed, self.reason = True, error

    def tell(self, error: Exception) -> None:
        """Hand whoever waits an error at once, whatever the generating thread does."""
        self._deliver(error)

    def hand_over(self, number: int, piece: StreamPiece) -> None:
        """Hand a piece over; the generating thread calls this, and never waits for whoever takes it."""
        if self.closed:
            return
        self._delivered += 1
        self.answered += len(piece.token_ids)
        behind = self._delivered - self._taken
        if self.most_behind is not None and behind > self.most_behind * len(self.asked):
            message = f"the client is {behind} pieces of its answer behind, so the answer was ended"
            self.abort(RequestError(message, code="client-behind"))
        else:
            self._deliver((number, piece))

    def leave(self, error: Exception | None = None) -> None:
        """End the pieces and free the places; the generating thread calls this once.

        error: what `__anext__` raises in place of an end.
        """
        self.worker.live.discard(self)
        self.worker.places.give_back(len(self.asked))
        self._over = True
        self._deliver(error)

    def _deliver(self, item: Item) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:
            # The loop has gone, and so has whoever asked.
            self.closed = True


class _Round:
    """One use of the model, from the first request until none is left.

    between: is called before each step.
    requests: the unfinished requests of each generation.  owners: the generation of each request.
    """

    def __init__(
        self,
        worker: Worker,
        session: Session,
        arrived: queue.SimpleQueue[Generation],
        between: Callable[[], None],
    ) -> None:
        self.worker, self.session, self.arrived, self.between = worker, session, arrived, between
        self.pulse, self.tally = worker.pulse, worker.tally
        self.requests: dict[Generation, list[Request]] = {}
        self.owners: dict[Request, Generation] = {}

    def run(self) -> None:
        try:
            while True:
                while not self.arrived.empty():
                    self._take(self.arrived.get())
                for generation in [generation for generation in self.requests if generation.closed]:
                    self._end(generation, generation.reason)
                if not self.requests:
                    return
                self.between()
                started = self.pulse.beat()
                stepped = self.session.step()
                ran = sum(len(request.running_sequence) for request, _ in stepped)
                self.tally.note_step(self.pulse.note_step(started, ran), ran)
                for request, piece in stepped:
                    self._hand_out(request, piece)
        except BaseException as error:
            foreign = not isinstance(error, PymllmError)
            logger.error("all requests under way have failed: %s", error, exc_info=foreign)
            self.worker.note_failure()
            told = error if isinstance(error, Exception) else RuntimeError(repr(error))
            for generation in list(self.requests):
                self._end(generation, told)

    def _take(self, generation: Generation) -> None:
        self.requests[generation] = []
        if generation.closed:
            return
        try:
            for number, one in enumerate(generation.asked):
                generation.worker.llm.check_adapter(one.adapter)
                request = self.session.add(
                    one.ids, one.params, one.adapter, number, first_scored=one.first_scored
                )
                request.arrived_at = generation.arrived_at
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
            if piece.token_ids:
                self.tally.note_piece(request, len(piece.token_ids))
            generation.hand_over(request.req_id, piece)
        if request.finish_reason is None:
            return
        if request.error is not None:
            self.worker.note_failure()
        metrics = None if piece is None or piece.output is None else piece.output.metrics
        self.tally.note_end(request, metrics)
        self.requests[generation].remove(request)
        del self.owners[request]
        if request.error is not None or not self.requests[generation]:
            self._end(generation, request.error or generation.reason)

    def _end(self, generation: Generation, error: Exception | None = None) -> None:
        for request in self.requests.pop(generation):
            del self.owners[request]
            if request in self.session.unfinished:
                self.session.abort(request)
            self.tally.note_end(request, None)
        generation.leave(error)
