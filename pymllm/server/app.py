"""The HTTP application: its routes, and the path of a request through them."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send
from torch import Tensor

from pymllm.api import LLM
from pymllm.embedding.embedder import EmbeddingInput, EmbeddingOptions
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.engine.session import StreamPiece
from pymllm.errors import ConfigError, PymllmError, RequestError
from pymllm.server.answers import ChatAnswer, CompletionAnswer, embedding_answer, usage_of
from pymllm.server.gate import OPEN_PATH, NoSuchModel, add_gate, error_body, read_body
from pymllm.server.protocol import ChatRequest, CompletionRequest, EmbeddingRequest, read_request, refuse
from pymllm.server.worker import Generation, Worker

logger = logging.getLogger("pymllm")

MAX_WAITING = 64

# How many grammars are compiled together.
COMPILERS = 2

T = TypeVar("T")


def create_app(
    llm: LLM,
    *,
    model_name: str,
    api_key: str | None = None,
    max_running: int = MAX_REQUESTS,
    max_waiting: int = MAX_WAITING,
) -> FastAPI:
    """Make the application for one loaded model.

    model_name: what clients call the model; adapters are called by their own names.  api_key: every request but
    /health must bring it; None: none need it.  max_running: how many prompts are answered together.
    max_waiting: how many more may wait; a request beyond these gets 503.
    """
    # No schema pages: protocol.py reads the bodies, and FastAPI does not know their shape.
    app = FastAPI(title="pymllm", docs_url=None, redoc_url=None, openapi_url=None)
    add_gate(app, api_key)
    service = _Service(llm, model_name, max_running, max_waiting)
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        parent = {} if name == model_name else {"parent": model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "pymllm", **parent}

    @app.get(OPEN_PATH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in (model_name, *llm.adapters)]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        service.adapter_of(name)
        return card(name)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await service.embed(request)

    return app


class _Service:
    """The work of the endpoints: read the request, take a place in the line, generate or embed, answer."""

    def __init__(self, llm: LLM, model_name: str, max_running: int, max_waiting: int) -> None:
        if model_name in llm.adapters:
            raise ConfigError(
                f"an adapter is called {model_name!r}, as the model itself",
                code="adapter-name",
                fix="Choose another name for the adapter or for the model.",
            )
        self.llm, self.model_name = llm, model_name
        # The worker makes the KV cache too: a machine without room for it fails before it serves.
        self.worker = Worker(llm, max_running, max_waiting)
        self._compilers = ThreadPoolExecutor(COMPILERS, "grammar")

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a request's `model` asks for; None: the model itself.

        Raises NoSuchModel for any other name.
        """
        if name is None or name == self.model_name:
            return None
        if name not in self.llm.adapters:
            raise NoSuchModel(
                f"there is no model {name!r} here",
                code="model_not_found",
                tensor="model",
                expected=" or ".join(map(repr, (self.model_name, *self.llm.adapters))),
            )
        return self.llm.check_adapter(name)

    async def answer(self, http: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        """Answer one HTTP request of this kind, whole or as a stream of events."""
        # Before any work.
        if self.llm.model.why_no_text is not None:
            raise RequestError(
                f"the model {self.model_name!r} does not generate text: {self.llm.model.why_no_text}",
                code="model_not_generative",
                tensor="model",
                fix="POST /v1/embeddings instead.",
            )
        self.worker.check_room()
        body = await read_body(http)
        request, prompts, params = await asyncio.to_thread(self._prepare, kind, body)
        adapter = self.adapter_of(request.model)
        await self._compile(request, params)
        generation = self.worker.start(
            [prompt for prompt in prompts for _ in range(params.n)],
            [params.of_answer(index) for _ in prompts for index in range(params.n)],
            adapter,
        )
        shape = ChatAnswer if isinstance(request, ChatRequest) else CompletionAnswer
        answer = shape(adapter or self.model_name, self.llm.tokenizer, params.n)
        try:
            if not request.stream:
                return JSONResponse(answer.whole(await unless_gone(http, generation.outputs())))
            # The first token comes before the headers, so that an error until then still gets its own status.
            first = await unless_gone(http, anext(generation))
        except BaseException as error:
            generation.close()
            if isinstance(error, RequestError):
                request.blame(error)
            raise
        usage = request.stream_options is not None and request.stream_options.include_usage
        return _EventStream(generation, stream_events(answer, generation, first, usage=usage))

    async def _compile(self, request: CompletionRequest | ChatRequest, params: SamplingParams) -> None:
        """Have the grammar of an answer compiled and kept: neither the step's thread nor other requests wait for it."""
        if params.follows is None:
            return
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._compilers, self.llm.grammars.start, params.follows)
        except RequestError as error:
            raise request.blame(error) from None

    async def embed(self, http: Request) -> Response:
        """Answer one request for embeddings; its batches take turns with the steps of others' answers."""
        self.worker.check_room()
        request, inputs = await asyncio.to_thread(self._prepare_embedding, await read_body(http))
        adapter = self.adapter_of(request.model)
        options = self.llm.embedder.options(dimensions=request.dimensions, adapter=adapter)
        with self.worker.place():
            vectors = await unless_gone(http, self._vectors(inputs, options))
        answer = embedding_answer(adapter or self.model_name, vectors, inputs, request.encoding_format)
        return JSONResponse(answer)

    async def _vectors(self, inputs: Sequence[EmbeddingInput], options: EmbeddingOptions) -> list[Tensor]:
        embedder = self.llm.embedder
        batches = embedder.batches(inputs)
        made = [await self.worker.call(functools.partial(embedder.run, batch, options)) for batch in batches]
        return [vector for vectors in made for vector in vectors]

    def _prepare_embedding(self, body: bytes) -> tuple[EmbeddingRequest, list[EmbeddingInput]]:
        """Read and check a request for embeddings, off the event loop.  Returns it and its texts' token ids."""
        request = read_request(EmbeddingRequest, body)
        self.adapter_of(request.model)
        try:
            return request, self.llm.embedder.encode(request.inputs, request.prompt_name)
        except RequestError as error:
            error.tensor = "input" if error.tensor != "prompt_name" else error.tensor
            raise

    def _prepare(
        self, kind: type[CompletionRequest] | type[ChatRequest], body: bytes
    ) -> tuple[CompletionRequest | ChatRequest, list[list[int]], SamplingParams]:
        """Read and check a request, off the event loop, as a long text takes a while to encode.

        Whatever is wrong with the request is refused here.  Returns it, its prompts' token ids and its settings.
        """
        request: CompletionRequest | ChatRequest = read_request(kind, body)
        self.adapter_of(request.model)
        try:
            params = self.llm.default_params(**request.sampling())
        except RequestError as error:
            raise request.blame(error) from None
        if isinstance(request, CompletionRequest):
            prompts = [self.llm.encode(prompt) for prompt in request.prompts]
        else:
            messages = [message.for_template() for message in request.messages]
            prompts = [self.llm.tokenizer.apply_chat_template(messages)]
        try:
            for prompt in prompts:
                self.llm.engine.check(prompt, params)
            if params.n > 1 and params.n * len(prompts) > self.worker.capacity:
                most = self.worker.capacity // len(prompts)
                refuse("n", f"is out of range: expected at most {most}, found {params.n}")
        except RequestError as error:
            if isinstance(request, ChatRequest) and error.tensor == "prompt":
                error.tensor = "messages"
            raise
        return request, prompts, params


async def unless_gone(http: Request, work: Awaitable[T]) -> T:
    """Wait for `work` and return its result; ClientDisconnect as soon as the client has left."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _until_gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class _EventStream(StreamingResponse):
    """A response of server-sent events; however the sending ends, it ends the generation too."""

    def __init__(self, generation: Generation, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def stream_events(
    answer: CompletionAnswer | ChatAnswer,
    generation: Generation,
    first: tuple[int, StreamPiece],
    *,
    usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of one answer, [DONE] at the end.  If an error comes first, it is the last event instead."""
    tail = {"usage": None} if usage else {}
    outputs = {}
    for chunk in answer.opening(len(generation.prompts)):
        yield _event({**chunk, **tail})
    try:
        async for index, piece in _chain(first, generation):
            if piece.output is not None:
                outputs[index] = piece.output
            if piece.text or piece.output is not None or piece.logprobs:
                reason = piece.output.finish_reason if piece.output is not None else None
                yield _event(
                    {**answer.chunk([answer.delta(index, piece.text, reason, piece.logprobs)]), **tail}
                )
    except Exception as error:
        logger.error("a stream ended early: %s", error, exc_info=not isinstance(error, PymllmError))
        message = str(error) if isinstance(error, PymllmError) else "internal error"
        yield _event(error_body(500, message))
        return
    if usage:
        in_order = [outputs[index] for index in sorted(outputs)]
        yield _event({**answer.chunk([]), "usage": usage_of(in_order, answer.n)})
    yield "data: [DONE]\n\n"


async def _chain(
    first: tuple[int, StreamPiece], rest: AsyncIterator[tuple[int, StreamPiece]]
) -> AsyncIterator[tuple[int, StreamPiece]]:
    yield first
    async for item in rest:
        yield item


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
