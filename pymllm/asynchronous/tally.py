"""The counts of what a model's thread has done: tokens, requests and how long they took, since it began."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from pymllm.engine.metrics import RequestMetrics
from pymllm.engine.request import Request

# Upper bounds in seconds, those of vLLM, so that its dashboards fit: to a first token, between tokens, of a request.
FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0),
)
REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """The numbers of values up to each of some bounds, and the sum of the values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.sum = tuple(bounds), 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def upto(self) -> list[int]:
        """The number of values up to each bound, and of all of them."""
        return list(itertools.accumulate(self._counts))


class Tally:
    """The counts of one thread's work; that thread alone writes, others may read.

    A value counts when it is known: a first token when it is there, a request when it has ended.
    """

    def __init__(self) -> None:
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.preemptions = self.drafts = self.drafted_tokens = self.accepted_tokens = 0
        self.finished: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.first_token, self.between_tokens = Histogram(FIRST_TOKEN), Histogram(TOKEN)
        self.a_token, self.whole = Histogram(TOKEN), Histogram(REQUEST)
        self.queued, self.prefill, self.decode = Histogram(REQUEST), Histogram(REQUEST), Histogram(REQUEST)
        self.prompt_lengths, self.answer_lengths = Histogram(TOKENS), Histogram(TOKENS)
        self.step_tokens, self.step_seconds = Histogram(STEP_TOKENS), Histogram(TOKEN)
        self._last: dict[Request, float] = {}

    def note_step(self, seconds: float, tokens: int) -> None:
        """Take in a step that ran so many tokens."""
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(tokens)

    def note_piece(self, request: Request, tokens: int) -> None:
        """Take in so many new tokens of a request, at least one."""
        now, before = request.last_token_at, self._last.get(request)
        if before is None:
            self.first_token.observe(request.first_token_at - request.arrived_at)
            self._note_prompt(request)
        else:
            self.between_tokens.observe(now - before)
        self.generated_tokens += tokens
        self._last[request] = now

    def note_end(self, request: Request, metrics: RequestMetrics | None) -> None:
        """Take in the end of a request.  metrics: None where it has no output, as it failed or was aborted."""
        if request not in self._last and metrics is not None:
            self._note_prompt(request)  # it was only read
        self._last.pop(request, None)
        self.preemptions += request.preemptions
        self.drafts += request.forwards if request.drafted else 0
        self.drafted_tokens += request.drafted
        self.accepted_tokens += request.accepted
        if metrics is None:
            self.finished["error" if request.error is not None else "abort"] += 1
            return
        self.finished[request.finish_reason or "abort"] += 1
        self.whole.observe(metrics.total_seconds)
        self.queued.observe(metrics.queue_seconds)
        self.prefill.observe(metrics.prefill_seconds)
        self.decode.observe(metrics.decode_seconds)
        self.prompt_lengths.observe(metrics.prompt_tokens)
        self.answer_lengths.observe(metrics.answer_tokens)
        if metrics.tpot is not None:
            self.a_token.observe(metrics.tpot)

    def _note_prompt(self, request: Request) -> None:
        self.prompt_tokens += len(request.prompt) + len(request.following)
        self.cached_tokens += request.cached_tokens
