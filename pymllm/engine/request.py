"""One request: its tokens, where it stands, and what it answers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from pymllm.engine.sampling import SamplerState, SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's log-probability of the chosen token, and of the likeliest few, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    text: "" without a tokenizer.  finish_reason: "stop" (end token or stop string), "length" or "abort".
    prefill_seconds: from admission to the first token.  decode_seconds: from there to the last.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        return len(self.prompt_token_ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(eq=False)
class Request:
    """A request in the engine.

    limit: the tokens it may have in all, prompt included.  adapter: the LoRA adapter it wants; None: the active one.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    adapter: str | None = None
    answer: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.sampler = SamplerState(self.params, self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    def add_token(self, token: int, end_tokens: frozenset[int]) -> None:
        """Append a sampled token and decide whether it is the last."""
        now = time.perf_counter()
        if not self.answer:
            self.first_token_at = now
        self.last_token_at = now
        self.answer.append(token)
        ends = token in self.params.stop_token_ids or (token in end_tokens and not self.params.ignore_eos)
        if ends:
            self.finish_reason = "stop"
        elif self.length >= self.limit:
            self.finish_reason = "length"

    def output(self, text: str = "") -> RequestOutput:
        assert self.finish_reason is not None
        return RequestOutput(
            tuple(self.prompt),
            tuple(self.answer),
            text,
            self.finish_reason,
            self.first_token_at - self.admitted_at,
            self.last_token_at - self.first_token_at,
            tuple(self.logprobs) if self.params.logprobs is not None else None,
        )
