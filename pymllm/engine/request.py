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
    req_id: which of the caller's prompts it is.  is_prefilling, running_sequence, new_tokens: of its latest step.
    computed: its first so many tokens have keys and values in `pages`.  preemptions: how often it lost them.
    error: what its own step raised; it is finished then.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    adapter: str | None = None
    req_id: int = 0
    answer: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    preemptions: int = 0
    error: Exception | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    is_prefilling: bool = True
    running_sequence: list[int] = field(default_factory=list)
    new_tokens: int = 0
    eos_token_generated: bool = False
    restart_length: int | None = None  # `CausalLM.restart_length`
    block_size: int = 1  # a token at a time, no block and no limit of other strategies
    blocks: tuple[()] = ()
    max_nfe_reached: bool = False
    max_repetition_run_reached: bool = False

    def __post_init__(self) -> None:
        self.sampler = SamplerState(self.params, self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def last_token(self) -> int:
        return self.answer[-1] if self.answer else self.prompt[-1]

    @property
    def missing(self) -> int:
        """How many of its tokens the cache lacks."""
        return self.length - self.computed

    def start_step(self, count: int) -> int:
        """The next `count` tokens that the cache lacks are to be run.  Returns how many."""
        start, read = self.computed, len(self.prompt)
        self.is_prefilling, self.new_tokens = start < read, 0
        if start >= read:
            self.running_sequence = self.answer[start - read : start - read + count]
        elif start + count <= read:
            self.running_sequence = self.prompt[start : start + count]
        else:
            self.running_sequence = (self.prompt + self.answer)[start : start + count]
        return count

    def end_step(self) -> bool:
        """They have been run.  Whether the cache now has all, so that another token follows."""
        self.computed += len(self.running_sequence)
        return self.computed == self.length

    def fail(self, error: Exception) -> None:
        self.error, self.finish_reason = error, "abort"

    # What `GenerationOutputs.record_step` reads besides.

    @property
    def full_response(self) -> list[int]:
        return self.answer

    @property
    def truncated_response(self) -> list[int]:
        """The answer without the token that ended it."""
        return self.answer[:-1] if self.eos_token_generated else self.answer

    @property
    def is_truncated(self) -> bool:
        return self.eos_token_generated

    @property
    def max_new_tokens_reached(self) -> bool:
        return self.finish_reason == "length" and len(self.answer) == self.params.max_tokens

    @property
    def max_model_len_reached(self) -> bool:
        return self.finish_reason == "length" and not self.max_new_tokens_reached

    @property
    def completion_reason(self) -> str | None:
        return self.finish_reason

    def add_token(self, token: int, end_tokens: frozenset[int]) -> None:
        """Append a sampled token and decide whether it is the last."""
        now = time.perf_counter()
        if not self.answer:
            self.first_token_at = now
        self.last_token_at = now
        self.answer.append(token)
        self.new_tokens += 1
        if self.length == self.restart_length:
            self.computed = 0
        ends = token in self.params.stop_token_ids or (token in end_tokens and not self.params.ignore_eos)
        if ends:
            self.finish_reason, self.eos_token_generated = "stop", True
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
