"""Requests take turns on the model: one thread generates, a bounded line waits, and whoever leaves is aborted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pymllm.api import LLM, StreamPiece
from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams


class Busy(Exception):
    """The line is full."""


class Worker:
    """The line before one model.  max_waiting: requests that may wait beside the one that runs."""

    def __init__(self, llm: LLM, max_waiting: int) -> None:
        self.llm, self.max_waiting = llm, max_waiting
        self.admitted = 0
        self.turn = asyncio.Lock()  # first come, first served
        self.thread = ThreadPoolExecutor(1, "generation")

    def check_room(self) -> None:
        """Busy if no more requests may wait."""
        if self.admitted > self.max_waiting:
            raise Busy

    def start(
        self, prompts: Sequence[list[int]], params: SamplingParams, adapter: str | None = None
    ) -> Generation:
        """Take a place in the line.  Busy if there is none."""
        self.check_room()
        self.admitted += 1
        generation = Generation(self, prompts, params, adapter)
        generation.task.add_done_callback(self._leave)
        return generation

    def _leave(self, task: asyncio.Task[None]) -> None:
        self.admitted -= 1


class Generation:
    """One request's pieces, as an async iterator of (index of the prompt, piece).

    `close` aborts it wherever it is: waiting at once, running after the step under way.
    """

    def __init__(
        self, worker: Worker, prompts: Sequence[list[int]], params: SamplingParams, adapter: str | None
    ) -> None:
        self.worker, self.prompts, self.params, self.adapter = worker, prompts, params, adapter
        self.closed = threading.Event()
        self.loop = asyncio.get_running_loop()
        self.pieces: asyncio.Queue[tuple[int, StreamPiece] | Exception | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._run())

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> tuple[int, StreamPiece]:
        item = await self.pieces.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    async def outputs(self) -> list[RequestOutput]:
        """Wait for the end of all."""
        finished = {index: piece.output async for index, piece in self if piece.output is not None}
        return [finished[index] for index in range(len(self.prompts))]

    def close(self) -> None:
        self.closed.set()
        self.task.cancel()

    async def _run(self) -> None:
        try:
            async with self.worker.turn:
                await self.loop.run_in_executor(self.worker.thread, self._generate)
            self.pieces.put_nowait(None)
        except Exception as error:  # for whoever awaits the pieces
            self.pieces.put_nowait(error)

    def _generate(self) -> None:
        """In the worker's thread, which alone steps the engine."""
        pieces = self.worker.llm.stream_all(self.prompts, self.params, adapter=self.adapter)
        with contextlib.closing(pieces) as stream:
            for item in stream:
                if self.closed.is_set():
                    return
                self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)
