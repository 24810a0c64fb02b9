"""`AsyncLLM`: one model for the tasks of an event loop, each of which awaits its own answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from pymllm.adapters import LoadedAdapter
from pymllm.api import LLM
from pymllm.arguments import checked
from pymllm.asynchronous.worker import Generation, Worker
from pymllm.engine.asking import Asked, ask, gather
from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.engine.scoring import Score
from pymllm.engine.session import StreamPiece
from pymllm.errors import ConfigError, RequestError, counted
from pymllm.text.prompts import Prompt, as_prompts


class AsyncLLM:
    """A model whose steps all tasks share: their requests join and leave between two steps.

    async with pymllm.AsyncLLM("path/to/model") as llm:
        answers = await asyncio.gather(*(llm.generate(prompt) for prompt in ("x = ", "y = ")))

    model: as `LLM` takes it, or an LLM that is loaded already.
    max_running: how many answers are made together.  Any number of calls may be open: those beyond twice as many wait
    in turn, before they cost memory of the engine.
    options: those of `LLM`, all of which it takes by name:
    quant, device, dtype, compute, kernels, kv_cache, revision, definition, strategy: and so on, as there.

    A call that is cancelled (its task, `asyncio.wait_for`, a stream that is closed) is aborted before the next step;
    its pages are free then. What one request does wrong, only its own call raises. Use it in one event loop at a time.
    """

    def __init__(
        self, model: str | Path | LLM | None = None, *, max_running: int = MAX_REQUESTS, **options: Any
    ) -> None:
        if isinstance(max_running, bool) or not isinstance(max_running, int) or max_running < 1:
            raise ConfigError(
                "max_running is out of range",
                code="parameter",
                tensor="max_running",
                expected="an integer of at least 1",
                found=repr(max_running),
            )
        if isinstance(model, LLM) and options:
            raise ConfigError(
                f"the model is loaded already, so {', '.join(options)} would change nothing",
                code="parameter",
                fix="Pass these to LLM.",
            )
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        if self.llm.parallel.size > 1 and not self.llm.parallel.led:
            raise ConfigError(
                "AsyncLLM cannot run on ranks that all have its requests, as those of torchrun would",
                code="async-parallel",
                expected="AsyncLLM(..., tensor_parallel_size=N), which starts the other ranks itself",
                found=f"{counted(self.llm.parallel.size, 'rank')} of torchrun",
            )
        self._worker = Worker(self.llm, max_running, max_running)
        self._open = 0
        self._closing = False
        self._done: list[asyncio.Future[None]] = []

    @checked({"params": SamplingParams})
    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or several, as `LLM.generate` does, whose arguments these are.

        If one of the prompts fails, the others of the call are aborted, and its error is raised.
        """
        with self._call():
            asked = await self._ask(as_prompts(prompts), params, adapter)
            outputs = await self._outputs(asked)
            return gather(
                {(one.place, one.index): output for one, output in zip(asked, outputs, strict=True)}
            )

    @checked({"params": SamplingParams})
    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> AsyncIterator[StreamPiece]:
        """Answer one prompt piece by piece, as `LLM.stream` does; each of n answers by its `index`.

        prompt, params, adapter: as for `generate`.  To leave the iterator's block early, close it (`aclose`,
        `contextlib.aclosing`): that aborts the request.
        """
        with self._call():
            asked = await self._ask([prompt], params, adapter)
            if len(asked) > self._worker.places.capacity:
                raise RequestError(
                    "n is out of range",
                    code="parameter",
                    tensor="n",
                    expected=f"at most {self._worker.places.capacity}, which is twice max_running",
                    found=str(len(asked)),
                )
            with await self._begin(asked) as generation:
                async for number, piece in generation:
                    yield replace(piece, index=number) if number else piece

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **template: Any,
    ) -> RequestOutput:
        """Answer [{"role": ..., "content": ...}, ...] through the checkpoint's chat template; else as `generate`.

        template: further arguments of `Tokenizer.render_chat`: tools, variables, continue_final_message, ...
        """
        self.llm.model.check_generates()
        ids = await asyncio.to_thread(self.llm.tokenizer.apply_chat_template, messages, **template)
        return (await self.generate([ids], params, adapter=adapter))[0]

    async def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt | None] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Score]:
        """Compute how likely the model finds continuations, as `LLM.score` does, whose arguments these are."""
        with self._call():
            scoring = await asyncio.to_thread(self.llm.scoring, prompts, continuations, adapter)
            return scoring.scores(await self._outputs(scoring.asked))

    async def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        pooling: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """Make the vectors of texts, as `LLM.embed` does, whose arguments these are."""
        with self._call():
            embedder = self.llm.embedder
            options = embedder.options(pooling, normalize, dimensions, self.llm.check_adapter(adapter))
            texts = texts.tolist() if isinstance(texts, Tensor) else texts
            inputs = await asyncio.to_thread(embedder.encode, as_prompts(texts), prompt_name, prompt)
            return embedder.joined(texts, await self._worker.embed(inputs, options), options)

    async def load_adapter(self, name: str, path: str | Path) -> LoadedAdapter:
        """Load a LoRA adapter between two steps, as `LLM.load_adapter` does.

        Answers under way that use another adapter of that name end with a RequestError.
        """
        with self._call():
            return await self._worker.call(lambda: self.llm.load_adapter(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Drop a LoRA adapter between two steps.  Answers under way that use it end with a RequestError."""
        with self._call():
            await self._worker.call(lambda: self.llm.unload_adapter(name))

    async def close(self, *, abort: bool = False) -> None:
        """Take no more calls, and wait until those that are open have ended.

        abort: whether to end them at once; each raises a RequestError then.
        """
        self._closing = True
        if abort:
            self._worker.refuse(_closed("the model was closed before the answer was there"))
        while self._open:
            done = asyncio.get_running_loop().create_future()
            self._done.append(done)
            await done
        self._worker.shut_down()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close: wait for open calls, or abort them where the block ends by an error."""
        await self.close(abort=error is not None)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Count a call as open.  RequestError if the model is closed."""
        if self._closing:
            raise _closed("the model is closed")
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            for done in self._done if not self._open else ():
                # close() itself may have been cancelled.
                if not done.done():
                    done.set_result(None)

    async def _ask(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | Sequence[str | None] | None,
    ) -> list[Asked]:
        """Read a call's arguments, off the event loop, and have its grammars compiled."""
        self.llm.model.check_generates()
        params = self.llm.default_params() if params is None else params
        asked = await asyncio.to_thread(ask, prompts, params, adapter, self.llm.encode_to_answer)
        for one in asked:
            self.llm.check_adapter(one.adapter)
            await self._worker.compile(one.params)
        return asked

    async def _begin(self, asked: Sequence[Asked]) -> contextlib.closing[Generation]:
        """Wait for places in the line, and start to make answers; they are aborted at the end of a `with` block."""
        self._worker.check_open()
        await self._worker.places.wait(len(asked))
        return contextlib.closing(self._worker.begin(asked))

    async def _outputs(self, asked: Sequence[Asked]) -> list[RequestOutput]:
        """Make answers, each when there is a place for it.  Returns their outputs in order."""
        todo, found = iter(enumerate(asked)), {}

        async def work() -> None:
            for number, one in todo:
                with await self._begin([one]) as generation:
                    (found[number],) = await generation.outputs()

        tasks = [asyncio.ensure_future(work()) for _ in range(min(len(asked), self._worker.places.capacity))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [found[number] for number in range(len(asked))]


def _closed(message: str) -> RequestError:
    return RequestError(message, code="closed", fix="Make another AsyncLLM.")
