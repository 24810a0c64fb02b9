"""The parameters of generation that every endpoint that generates takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pymllm.engine.sampling import BLOCK_SETTINGS
from pymllm.engine.sampling import GRAMMARS as SETTINGS
from pymllm.errors import RequestError
from pymllm.server.protocol.base import BodyRequest, Many, StrictModel, refuse
from pymllm.server.protocol.neutral import GENERATING, Neutral

if TYPE_CHECKING:
    from pymllm.server.protocol.chat import ChatRequest

# The parameters that may bring a grammar.
GRAMMARS = (
    *("response_format", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_grammar", "guided_choice"),
)

TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(StrictModel):
    """The things that come with a stream.

    include_usage: a count of tokens at its end.  continuous_usage_stats: one in every chunk.  include_obfuscation:
    letters that hide the length of a chunk, which this server does not send.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(StrictModel):
    """A JSON schema as OpenAI's clients send it.  name, description, strict: accepted; every schema is strict here."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(StrictModel):
    """The form of an answer.  grammar, regex: of the types of these names."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: NamedSchema | None = None
    regex: str | None = None
    grammar_: str | None = Field(default=None, alias="grammar")

    def grammar(self) -> dict[str, Any]:
        """Return the keyword of SamplingParams that says so; {} for any text."""
        given = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar_}
        for name, value in given.items():
            if value is not None and name != self.type:
                refuse("response_format", f"has {name} where its type is {name}, and it is {self.type}")
        if self.type == "json_object":
            return {"json_schema": {"type": "object"}}
        if self.type == "text":
            return {}
        value = given[self.type]
        if value is None:
            refuse("response_format", f"of the type {self.type} needs a {self.type}")
        return {self.type: value.schema_ if isinstance(value, NamedSchema) else value}


class StructuredOutputs(StrictModel):
    """The form of an answer as vLLM's requests have it: one of these.

    json_object: any object.  The rest is accepted where it asks for nothing.
    """

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Many[str] | None = None
    grammar_: str | None = Field(default=None, alias="grammar")
    json_object: bool | None = None
    structural_tag: None = None
    whitespace_pattern: None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = None  # there is nothing to fall back to

    def grammar(self) -> dict[str, Any]:
        """Return the keyword of SamplingParams that says so."""
        given = {
            "json_schema": self.json_,
            "regex": self.regex if self.choice is None else _one_of("structured_outputs", self.choice),
            "grammar": self.grammar_,
        }
        found = [{name: value} for name, value in given.items() if value is not None]
        found += [{"json_schema": {"type": "object"}}] if self.json_object else []
        if len(found) != 1 or (self.regex is not None and self.choice is not None):
            refuse("structured_outputs", "must have one of json, regex, choice, grammar and json_object")
        return found[0]


class SampledRequest(BodyRequest):
    """The parameters that both endpoints take.

    None: the checkpoint's recommendation, or the default of SamplingParams.  best_of: as many as n, or none.
    truncate_prompt_tokens: how many of a prompt's last tokens are read; -1: as many as there is room for.
    return_token_ids, return_tokens_as_token_ids: whether an answer has its token ids, and names tokens token_id:7.
    Accepted, though they change no answer: user and the names beside it, of requests, of clients and of what they keep.
    """

    NEUTRAL: ClassVar[Neutral] = GENERATING

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    request_id: str | None = None
    rid: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
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
    stop: str | Many[str] | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool | None = None
    bad_words: Many[str] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None
    remasking: str | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    max_nfe: int | None = None
    max_repetition_run: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Many[str] | None = None

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
        "skip_special_tokens",
        "include_stop_str_in_output",
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
        if self.structured_outputs is not None:
            found.append(self.structured_outputs.grammar())
        if self.guided_choice is not None:
            found.append({"regex": _one_of("guided_choice", self.guided_choice)})
        named = (
            ("json_schema", self.guided_json),
            ("regex", self.guided_regex),
            ("grammar", self.guided_grammar),
        )
        found += [{name: value} for name, value in named if value is not None]
        found = [grammar for grammar in found if grammar]
        if len(found) > 1:
            refuse(
                "response_format",
                "(or structured_outputs, guided_*) names several grammars; an answer follows one",
            )
        return found[0] if found else {}

    def as_chat(self) -> ChatRequest | None:
        """Return the chat that this request is; None: it is none."""
        return None

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
    def counts_usage(self) -> bool:
        """Tell whether a stream is to end with a count of the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def shown(self) -> dict[str, bool]:
        """The fields of `Shown`: what the answer shows beside its text."""
        return {
            "usage": self.counts_usage,
            "running_usage": self.stream_options is not None
            and bool(self.stream_options.continuous_usage_stats),
            "token_ids": bool(self.return_token_ids),
            "names_ids": bool(self.return_tokens_as_token_ids),
        }

    @property
    def reads_only(self) -> bool:
        """Tell whether the prompt is to be read, and not answered."""
        return False

    @property
    def alternatives(self) -> int | None:
        """The number of likeliest tokens to report for each token; None: no log-probabilities."""
        return None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            refuse("prompt_logprobs", "needs stream: false")
        if self.truncate_prompt_tokens == 0:
            refuse("truncate_prompt_tokens", "is out of range: expected -1, or at least 1, found 0")
        if self.best_of not in (None, self.n or 1):
            refuse("best_of", "must be n: no answers are left out", code="unsupported_parameter")


def _one_of(param: str, choices: list[str]) -> str:
    """Write the regular expression of one of these texts."""
    if not choices:
        refuse(param, "must name a choice")
    return "|".join(f"({re.escape(choice)})" for choice in choices)


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and str(int(text)) == text):
        refuse("logit_bias", f"expected token ids as keys, found {text[:40]!r}")
    return int(text)
