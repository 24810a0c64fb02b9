"""What a body asks for, and its answer: the same whether it came over HTTP or as a line of a file."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from pymllm.api import LLM
from pymllm.asynchronous.worker import Generation, Worker
from pymllm.embedding.embedder import EmbeddingInput, EmbeddingOptions
from pymllm.engine.asking import Asked
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import ConfigError, RequestError, choices, nearest
from pymllm.server.answers.anthropic import MessagesAnswer
from pymllm.server.answers.base import Answer, Shown
from pymllm.server.answers.chat import ChatAnswer
from pymllm.server.answers.completions import CompletionAnswer, Echo
from pymllm.server.answers.conversation import Conversation
from pymllm.server.answers.embeddings import embedding_answer
from pymllm.server.answers.responses import ResponsesAnswer
from pymllm.server.chats import find_variables, prepare_chat
from pymllm.server.prompting import completion_prompts, cut
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.server.protocol.base import read_request, refuse
from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.protocol.completions import CompletionRequest
from pymllm.server.protocol.conversation import ConversationRequest
from pymllm.server.protocol.embeddings import EmbeddingRequest
from pymllm.server.protocol.responses import ResponsesRequest
from pymllm.server.protocol.sampled import SampledRequest
from pymllm.server.refusals import NoSuchModel
from pymllm.text.chat_template import LARGE_REQUEST
from pymllm.text.dialect import Dialect, dialect_of
from pymllm.text.encoders import LONG_TEXTS
from pymllm.text.parts import ContentReader, PartReader

T = TypeVar("T")

# How many conversations are read at a time, which may be slow: other prompts have threads of their own.
CHAT_READERS = 8

# The answers to conversations of other APIs than chat's.
CONVERSATIONS: Mapping[type[ConversationRequest], Callable[..., Answer]] = {
    ResponsesRequest: ResponsesAnswer,
    MessagesRequest: MessagesAnswer,
}


@dataclass(frozen=True)
class Question:
    """A request that was read and checked: its prompts' token ids, its settings and its adapter.

    new_reader: makes the reader of one answer to a conversation.
    original: the request of another API that `request`, a chat, stands for; None: it was this one that came.
    """

    request: SampledRequest
    prompts: list[list[int]]
    params: SamplingParams
    adapter: str | None
    new_reader: Callable[[], PartReader] = ContentReader
    original: ConversationRequest | None = None

    @property
    def stream(self) -> bool:
        """Tell whether the answer is to come as a stream of events."""
        return self.request.stream if self.original is None else self.original.stream

    def blame(self, error: RequestError) -> RequestError:
        """Name the parameter in an error as the client has spelled it.  Returns the error."""
        error = self.request.blame(error)
        return error if self.original is None else self.original.blame(error)

    @property
    def asked(self) -> list[Asked]:
        """The answers that it asks for, those of the first prompt first."""
        first_scored = 1 if self.request.reads_only else None
        return [
            Asked(ids, self.params.of_answer(index), self.adapter, place, index, first_scored)
            for place, ids in enumerate(self.prompts)
            for index in range(self.params.n)
        ]


@dataclass(frozen=True)
class EmbeddingQuestion:
    """A request for embeddings that was read and checked."""

    request: EmbeddingRequest
    inputs: list[EmbeddingInput]
    options: EmbeddingOptions
    adapter: str | None


class Service:
    """One model's answers to bodies of requests.

    model_name: what clients call the model.  other_names: what they may call it as well.
    worker: the thread that runs it.
    """

    def __init__(
        self, llm: LLM, model_name: str, max_running: int, max_waiting: int, other_names: Sequence[str] = ()
    ) -> None:
        self.names = tuple(dict.fromkeys((model_name, *other_names)))
        taken = next((name for name in self.names if name in llm.adapters), None)
        if taken is not None:
            raise ConfigError(
                f"an adapter is called {taken!r}, as the model itself",
                code="adapter-name",
                fix="Choose another name for the adapter or for the model.",
            )
        self.llm, self.model_name = llm, model_name
        # The worker makes the KV cache too: a machine without room for it fails before it serves.
        self.worker = Worker(llm, max_running, max_waiting)
        self._chats = ThreadPoolExecutor(CHAT_READERS, "chats")
        # One at a time, so that there are always threads for others.
        self._large_chats = ThreadPoolExecutor(1, "large-chats")
        # As many as long texts are encoded together.
        self._large_texts = ThreadPoolExecutor(LONG_TEXTS, "large-texts")

    @functools.cached_property
    def dialect(self) -> Dialect:
        """The way in which the chat template's models write thoughts and calls of tools."""
        return dialect_of(self.llm.tokenizer)

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that a request's `model` asks for; None: the model itself.

        Raises NoSuchModel for any other name.
        """
        if name is None or name in self.names:
            return None
        if name not in self.llm.adapters:
            raise NoSuchModel(
                f"there is no model {name[:140]!r} here",
                code="model_not_found",
                tensor="model",
                expected=choices(map(repr, (*self.names, *self.llm.adapters)), name[:140]),
                fix=nearest(name[:140], (*self.names, *self.llm.adapters)),
            )
        return self.llm.check_adapter(name)

    def check_generates(self) -> None:
        """Refuse with a RequestError where the model does not generate text."""
        if self.llm.model.why_no_text is not None:
            raise RequestError(
                f"the model {self.model_name!r} does not generate text: {self.llm.model.why_no_text}",
                code="model_not_generative",
                tensor="model",
                fix="POST /v1/embeddings instead.",
            )

    async def read(
        self, kind: type[SampledRequest] | type[ConversationRequest], body: bytes | Mapping[str, Any]
    ) -> Question:
        """Read and check a body, off the event loop, as a long text takes a while to encode; compile its grammar."""
        question = await self._off_the_loop(kind, body, functools.partial(self._read, kind, body))
        try:
            await self.worker.compile(question.params)
        except RequestError as error:
            raise question.blame(error) from None
        return question

    @functools.cached_property
    def variables(self) -> tuple[str, ...]:
        """The variables about thinking that the chat template reads."""
        return find_variables(self.dialect)

    def prompt_of(self, chat: ChatRequest) -> list[int]:
        """Return the token ids of the prompt that a chat becomes.  RequestError if its template cannot honour it."""
        return prepare_chat(chat, {}, self.llm.tokenizer, self.dialect).prompt

    async def count(self, kind: type[ConversationRequest], body: bytes | Mapping[str, Any]) -> int:
        """Count the tokens of the prompt that a conversation becomes, off the event loop."""

        def count() -> int:
            request = read_request(kind, body)
            self.adapter_of(request.model)
            try:
                return len(self.prompt_of(request.as_chat(self.variables)))
            except RequestError as error:
                raise request.blame(error) from None

        return await self._off_the_loop(kind, body, count)

    async def _off_the_loop(self, kind: type, body: bytes | Mapping[str, Any], read: Callable[[], T]) -> T:
        large = len(body) > LARGE_REQUEST
        if kind in (CompletionRequest, EmbeddingRequest):
            threads = self._large_texts if large else None
        else:
            threads = self._large_chats if large else self._chats
        return await asyncio.get_running_loop().run_in_executor(threads, read)

    def answer_to(self, question: Question) -> Answer:
        """Begin the objects that answer a question."""
        request, n = question.request, question.params.n
        name, tokenizer = question.adapter or self.model_name, self.llm.tokenizer
        conversation = Conversation(question.new_reader)
        if question.original is not None:
            answer = CONVERSATIONS[type(question.original)]
            return answer(name, tokenizer, conversation, question.original, question.params)
        shown = Shown(**request.shown, prompts=question.prompts)
        if isinstance(request, CompletionRequest):
            echo = self._echo(request, question.prompts)
            return CompletionAnswer(name, tokenizer, n, echo, shown)
        assert isinstance(request, ChatRequest)
        return ChatAnswer(name, tokenizer, n, conversation, shown)

    async def answer(self, question: Question, generation: Generation) -> dict[str, Any]:
        """Wait for the whole answer to a question that was begun."""
        try:
            return self.answer_to(question).whole(await generation.outputs())
        except RequestError as error:
            raise question.blame(error) from None

    async def read_embedding(self, body: bytes | Mapping[str, Any]) -> EmbeddingQuestion:
        """Read and check a request for embeddings, off the event loop."""
        read = functools.partial(self._read_embedding, body)
        return await self._off_the_loop(EmbeddingRequest, body, read)

    async def embed(self, question: EmbeddingQuestion) -> dict[str, Any]:
        """Answer a request for embeddings; its batches take turns with the steps of others' answers."""
        batches: Sequence[Tensor] = await self.worker.embed(question.inputs, question.options)
        vectors = [vector for batch in batches for vector in batch]
        name = question.adapter or self.model_name
        return embedding_answer(name, vectors, question.inputs, question.request.encoding_format)

    def _echo(self, request: CompletionRequest, prompts: Sequence[list[int]]) -> Echo | None:
        if not request.echo:
            return None
        decode = self.llm.tokenizer.decode if self.llm.tokenizer.available else lambda ids: ""
        texts = [
            given if isinstance(given, str) and request.truncate_prompt_tokens is None else decode(ids)
            for given, ids in zip(request.prompts, prompts, strict=True)
        ]
        return Echo(texts, list(prompts), request.logprobs is not None)

    def _read_embedding(self, body: bytes | Mapping[str, Any]) -> EmbeddingQuestion:
        request = read_request(EmbeddingRequest, body)
        adapter, embedder = self.adapter_of(request.model), self.llm.embedder
        # Before the texts are encoded, which takes a while.
        options = embedder.options(
            dimensions=request.dimensions, normalize=request.normalize, adapter=adapter
        )
        try:
            inputs = embedder.encode(request.inputs, request.prompt_name)
        except RequestError as error:
            error.tensor = "input" if error.tensor != "prompt_name" else error.tensor
            raise
        return EmbeddingQuestion(request, inputs, options, adapter)

    def _read(
        self, kind: type[SampledRequest] | type[ConversationRequest], body: bytes | Mapping[str, Any]
    ) -> Question:
        """Read a request.  Whatever is wrong with it is refused here."""
        request = read_request(kind, body)
        if isinstance(request, SampledRequest):
            return self._question(request)
        try:
            return replace(self._question(request.as_chat(self.variables)), original=request)
        except RequestError as error:
            raise request.blame(error) from None

    def _question(self, request: SampledRequest) -> Question:
        adapter = self.adapter_of(request.model)
        settings, chat = request.sampling(), request.as_chat()
        try:
            if chat is None:
                assert isinstance(request, CompletionRequest)
                prompts = completion_prompts(self.llm, request)
                new_reader: Callable[[], PartReader] = ContentReader
            else:
                asked = prepare_chat(chat, settings, self.llm.tokenizer, self.dialect)
                prompts, settings, new_reader = [asked.prompt], asked.settings, asked.new_reader
            params = self.llm.default_params(**settings)
        except RequestError as error:
            raise request.blame(error) from None
        prompts = [cut(self.llm, request, prompt) for prompt in prompts]
        question = Question(request, prompts, params, adapter, new_reader)
        try:
            for prompt in question.prompts:
                self.llm.engine.check(prompt, params, answers=not request.reads_only)
            if params.n > 1 and params.n * len(question.prompts) > self.worker.places.capacity:
                most = self.worker.places.capacity // len(question.prompts)
                refuse("n", f"is out of range: expected at most {most}, found {params.n}")
        except RequestError as error:
            if chat is not None and error.tensor == "prompt":
                error.tensor = "messages"
            raise request.blame(error) from None
        return question
