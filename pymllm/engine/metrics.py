"""The times and counts of one request, from its arrival to its last token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymllm.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """One request's times, in seconds, and its counts.

    arrived: when it came, in seconds since 1970.  queue_seconds: from its arrival to its admission.
    prefill_seconds: from its admission to its first token, or to the end where it has none.
    decode_seconds: from the first token to the last.
    prompt_tokens, answer_tokens: their numbers.  cached_tokens: how many of the prompt's were not read, as pages of the
    KV cache held them already.  preemptions: how often it lost its pages and had to read its text again.
    steps: how many runs of the model it took part in.  forwards: how many of these decoded.  decoded_tokens: how many
    tokens came of those.
    drafted_tokens, accepted_tokens: how many tokens a strategy that drafts proposed for it, and how many it kept; 0
    where the strategy does not draft.
    """

    arrived: float
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int
    preemptions: int
    steps: int
    forwards: int
    decoded_tokens: int
    drafted_tokens: int
    accepted_tokens: int

    @property
    def ttft(self) -> float | None:
        """Time to the first token, from the arrival; None without a token."""
        return self.queue_seconds + self.prefill_seconds if self.answer_tokens else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        return self.decode_seconds / (self.answer_tokens - 1) if self.answer_tokens > 1 else None

    @property
    def total_seconds(self) -> float:
        """The time from the arrival to the last token."""
        return self.queue_seconds + self.prefill_seconds + self.decode_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """The speed of the tokens after the first; None where there is none, or no time has passed."""
        return (
            (self.answer_tokens - 1) / self.decode_seconds
            if self.answer_tokens > 1 and self.decode_seconds > 0
            else None
        )

    @property
    def tpf(self) -> float | None:
        """Tokens per forward, of those that decode; None where none did."""
        return self.decoded_tokens / self.forwards if self.forwards else None

    @property
    def acceptance_rate(self) -> float | None:
        """The share of drafted tokens that were kept; None where none was drafted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


def measure(request: Request) -> RequestMetrics:
    """Take the metrics of a request as it stands: one that was aborted may have no admission, or no token."""
    now = time.perf_counter()
    admitted = request.admitted_at or now
    first = request.first_token_at if request.answer else max(now, admitted)
    return RequestMetrics(
        arrived=time.time() - (now - request.arrived_at),
        queue_seconds=admitted - request.arrived_at,
        prefill_seconds=first - admitted,
        decode_seconds=request.last_token_at - first if request.answer else 0.0,
        prompt_tokens=len(request.prompt) + len(request.following),
        answer_tokens=len(request.answer),
        cached_tokens=request.cached_tokens,
        preemptions=request.preemptions,
        steps=request.steps,
        forwards=request.forwards,
        decoded_tokens=request.decoded,
        drafted_tokens=request.drafted,
        accepted_tokens=request.accepted,
    )
