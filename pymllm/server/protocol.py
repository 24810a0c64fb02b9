"""The requests that clients may send: bodies are read strictly, and what is not supported is refused by its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pymllm.engine.sampling import BLOCK_SETTINGS, MAX_LOGPROBS
from pymllm.engine.sampling import GRAMMARS as SETTINGS
from pymllm.errors import RequestError

# How many prompts one request may bring.
MAX_PROMPTS = 16

# How many texts one request for embeddings may bring, as OpenAI has it.
MAX_INPUTS = 2048

# OpenAI's default of max_tokens for completions.
COMPLETION_MAX_TOKENS = 16

# Parameters that this server does not have, each with the values that ask for nothing; null is always
# one of them.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    # Those of other servers.
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "repeat_penalty": (1, 1.0),
    "priority": (0,),
    "cache_prompt": (True, False),
}

# The parameters that may bring a grammar.
GRAMMARS = ("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice")

TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool = False


class NamedSchema(_Strict):
    """A JSON schema as OpenAI's clients send it.  name, description, strict: accepted; every schema is strict here."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(_Strict):
    """The form of an answer.  grammar, regex: of the types of these names."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: NamedSchema | None = None
    regex: str | None = None
    grammar_: str | None = Field(default=None, alias="grammar")

    def grammar(self) -> dict[str, Any]:
        """Return the keyword of SamplingParams that says so; {} for any text."""
        if self.type == "json_object":
            return {"json_schema": {"type": "object"}}
        given = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar_}
        if self.type == "text":
            return {}
        value = given[self.type]
        if value is None:
            refuse("response_format", f"of the type {self.type} needs a {self.type}")
        return {self.type: value.schema_ if isinstance(value, NamedSchema) else value}


class _Sampled(_Strict):
    """The parameters that both endpoints take.

    None: the checkpoint's recommendation, or the default of SamplingParams.  user, request_id: accepted, but they
    change no answer.  best_of: as many as n, or none.
    """

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    request_id: str | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None
    remasking: str | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    max_nfe: int | None = None
    max_repetition_run: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None

    COPIED: ClassVar[tuple[str, ...]] = (
        "n",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "bad_words",
        "seed",
        "prompt_logprobs",
        *BLOCK_SETTINGS,
    )

    def sampling(self) -> dict[str, Any]:
        """Return the keywords of SamplingParams that this request sets."""
        chosen = {name: getattr(self, name) for name in self.COPIED if getattr(self, name) is not None}
        if self.logit_bias is not None:
            chosen["logit_bias"] = tuple((_token_id(key), bias) for key, bias in self.logit_bias.items())
        chosen |= self._grammar()
        return {**chosen, "max_tokens": self.answer_length, "logprobs": self.alternatives}

    def _grammar(self) -> dict[str, Any]:
        """Return the keyword of SamplingParams for the grammar that the answer is to follow, if any."""
        found = [] if self.response_format is None else [self.response_format.grammar()]
        if self.guided_choice is not None:
            if not self.guided_choice:
                refuse("guided_choice", "must name a choice")
            found.append({"regex": "|".join(f"({re.escape(choice)})" for choice in self.guided_choice)})
        named = (
            ("json_schema", self.guided_json),
            ("regex", self.guided_regex),
            ("grammar", self.guided_grammar),
        )
        found += [{name: value} for name, value in named if value is not None]
        found = [grammar for grammar in found if grammar]
        if len(found) > 1:
            refuse("response_format", "and guided_* name several grammars; an answer follows one")
        return found[0] if found else {}

    def blame(self, error: RequestError) -> RequestError:
        """Name the grammar's parameter in an error as the client has spelled it.  Returns the error."""
        given = [name for name in GRAMMARS if getattr(self, name) is not None]
        # A response_format that asks for any text may stand beside the one that is meant.
        if error.code in ("grammar", "parameter") and error.tensor in SETTINGS and given:
            error.message = given[-1] + error.message.removeprefix(error.tensor)
            error.tensor = given[-1]
        return error

    @property
    def answer_length(self) -> int | None:
        """The number of new tokens at most; None: as many as the context holds."""
        return self.max_tokens

    @property
    def reads_only(self) -> bool:
        """Tell whether the prompt is to be read, and not answered."""
        return False

    @property
    def alternatives(self) -> int | None:
        """The number of likeliest tokens to report for each token; None: no log-probabilities."""
        return None


class CompletionRequest(_Sampled):
    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    def sampling(self) -> dict[str, Any]:
        """Return the keywords of SamplingParams; where the prompt is echoed, its tokens' log-probabilities come too."""
        chosen = super().sampling()
        if self.reads_only and chosen.get("min_tokens"):
            refuse("min_tokens", f"is out of range: expected 0, as max_tokens is 0, found {self.min_tokens}")
        if self.echo and self.logprobs is not None:
            if self.prompt_logprobs is not None:
                refuse("prompt_logprobs", "needs echo: false, as logprobs has those of an echoed prompt")
            chosen["prompt_logprobs"] = self.logprobs
        return chosen

    @property
    def answer_length(self) -> int:
        if self.reads_only:
            return 1
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def reads_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, each a text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        if not 1 <= len(self.prompt) <= MAX_PROMPTS:
            refuse("prompt", f"expected 1 to {MAX_PROMPTS} prompts, found {len(self.prompt)}")
        return self.prompt  # type: ignore[return-value]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it: they know `system`, not OpenAI's later name `developer`."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(_Sampled):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def answer_length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        if not self.logprobs and self.top_logprobs is not None:
            refuse("top_logprobs", "needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingRequest(_Strict):
    """OpenAI's request, and sentence-transformers' `prompt_name` beside it."""

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    prompt_name: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The texts, one or several, each a text or token ids."""
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]  # type: ignore[list-item]
        if not 1 <= len(self.input) <= MAX_INPUTS:
            refuse("input", f"expected 1 to {MAX_INPUTS} texts, found {len(self.input)}")
        return self.input  # type: ignore[return-value]


def _refuse_other_parts(messages: list[Any]) -> None:
    """Refuse images, sounds and files in messages: models of several kinds of input run their text model alone."""
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                refuse(
                    "messages",
                    f"may hold text alone: {kind!r} (at messages.{index}.content.{place}) is not read by this server",
                    code="unsupported_content",
                )


R = TypeVar("R", bound=_Strict)


def read_request(kind: type[R], body: bytes | Mapping[str, Any]) -> R:
    """Read a request of this kind from a body.  RequestError, with the parameter's name if one is to blame.

    body: JSON, or what `parse_json` made of it.
    """
    raw = dict(body) if isinstance(body, Mapping) else parse_json(body)
    if not isinstance(raw, dict):
        raise RequestError("the body must be a JSON object", code="json", found=type(raw).__name__)
    for name, neutral in NEUTRAL.items():
        if name in kind.model_fields:
            continue
        if raw.get(name) is not None and not any(_same(raw[name], value) for value in neutral):
            refuse(name, "is not supported by this server", code="unsupported_parameter")
        raw.pop(name, None)
    raw = {key: value for key, value in raw.items() if value is not None}
    # False is the chat API's way to ask for no log-probabilities.
    if kind is CompletionRequest and raw.get("logprobs") is False:
        del raw["logprobs"]
    if kind is ChatRequest and isinstance(raw.get("messages"), list):
        # Clients send back the messages that they were given, with null for what an answer did not have.
        raw["messages"] = [
            {key: value for key, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in raw["messages"]
        ]
        _refuse_other_parts(raw["messages"])
    try:
        request = kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name, where = str(first["loc"][0]), ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            refuse(name, "is not supported by this server", code="unsupported_parameter")
        if name in ("prompt", "input") and name in raw:
            refuse(name, f"must be text, token ids, or a list of such {name}s")
        detail = first["msg"][0].lower() + first["msg"][1:]
        refuse(name, detail if where == name else f"{detail} (at {where})")
    if not isinstance(request, _Sampled):
        return request
    if request.stream_options is not None and not request.stream:
        refuse("stream_options", "needs stream: true")
    if request.prompt_logprobs is not None and request.stream:
        refuse("prompt_logprobs", "needs stream: false")
    if request.best_of not in (None, request.n or 1):
        refuse("best_of", "must be n: no answers are left out", code="unsupported_parameter")
    return request


def parse_json(body: bytes) -> Any:
    """Parse a JSON text strictly: UTF-8, finite numbers, whole characters.  RequestError if it is none."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite)
        # Half a surrogate pair is no text: it cannot be encoded again.
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError is a ValueError.
        raise RequestError(f"the body is not valid JSON: {error}", code="json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _same(value: Any, neutral: Any) -> bool:
    """Compare values and their types: 1 equals True, but is not the same."""
    return type(value) is type(neutral) and value == neutral


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        refuse("logit_bias", f"expected token ids as keys, found {text[:40]!r}")
    return int(text)


def refuse(param: str, message: str, *, code: str = "parameter") -> NoReturn:
    """Raise the RequestError for a parameter; `message` goes on from its name."""
    raise RequestError(f"{param} {message}", code=code, tensor=param)
