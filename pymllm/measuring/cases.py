"""What is measured: prefill of so many tokens, or decoding of so many, as llama-bench names and means them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pymllm.engine.scheduler import STEP_TOKENS
from pymllm.errors import ConfigError
from pymllm.kernels.attention import PAGE_SIZE

PROMPT_TOKENS, ANSWER_TOKENS = 512, 128


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    reads: prefill of `tokens` tokens; else decoding of as many, one a step.  batch: requests side by side, with so many
    tokens each.  threads: of a CPU.  depth: how many tokens each request has before them.
    """

    reads: bool
    tokens: int
    batch: int
    threads: int
    depth: int = 0

    @property
    def name(self) -> str:
        """The name that llama-bench gives it: pp512, tg128, tg128 @ d1024."""
        return f"{'pp' if self.reads else 'tg'}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def request_tokens(self) -> int:
        """The most tokens that a request has, with those that come while others are still read."""
        if self.reads:
            return self.depth + self.tokens + 1
        return self.depth + self.tokens + _spare(self.batch, self.depth)

    @property
    def cache_tokens(self) -> int:
        """The tokens that the KV cache needs room for: whole pages, and one more of each request for its next step."""
        return self.batch * (-(-self.request_tokens // PAGE_SIZE) + 1) * PAGE_SIZE


def _spare(batch: int, depth: int) -> int:
    """Count the tokens that a request may get beside those that are measured, while others are still read."""
    return 2 + 2 * (batch * (depth + 1) // STEP_TOKENS)


def default_sizes(longest: int, batch: int, depth: int) -> tuple[int, int]:
    """Return the sizes of prefill and decoding where none are asked for: llama-bench's, or what the model has room for.

    longest: the most tokens of a request.  batch, depth: the largest that are wanted.
    """
    room = max(1, longest - depth - _spare(batch, depth))
    return min(PROMPT_TOKENS, room), min(ANSWER_TOKENS, room)


def make_cases(
    prompts: Sequence[int],
    answers: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int],
    depths: Sequence[int],
) -> list[Case]:
    """Combine what is asked for; a size of 0 is left out.  Those of as many threads stand together."""
    sizes = [(True, size) for size in prompts if size] + [(False, size) for size in answers if size]
    return [
        Case(reads=reads, tokens=size, batch=batch, threads=count, depth=depth)
        for count, depth, batch, (reads, size) in itertools.product(threads, depths, batches, sizes)
    ]


def check_cases(cases: Sequence[Case], longest: int, cache_tokens: int, requests: int, model: str) -> None:
    """Refuse what the model has no positions for, or the cache no room (ConfigError).

    longest: the most tokens of a request.  cache_tokens: of all requests.  requests: how many run side by side at most.
    """
    for case in cases:
        if case.batch > requests:
            raise ConfigError(
                f"{case.name} with a batch of {case.batch}: so many requests do not run side by side",
                code="bench-batch",
                file=model,
                expected=f"a batch of at most {requests}",
                found=str(case.batch),
                fix="Ask for smaller ones with --batch.",
            )
        if case.request_tokens > longest:
            raise ConfigError(
                f"{case.name}: a request may have no more than {longest} tokens here",
                code="bench-length",
                file=model,
                expected=f"depth and size of at most {longest - (case.request_tokens - case.depth - case.tokens)} "
                "tokens together",
                found=str(case.depth + case.tokens),
                fix="Ask for fewer with --prompt-tokens, --answer-tokens and --depth"
                + (
                    ", or for more room with --max-model-len and --kv-memory."
                    if cache_tokens <= longest
                    else "."
                ),
            )
        if case.cache_tokens > cache_tokens:
            raise ConfigError(
                f"{case.name} with a batch of {case.batch}: the KV cache is too small",
                code="bench-cache",
                file=model,
                expected=f"room for {case.cache_tokens} tokens",
                found=str(cache_tokens),
                fix="Give it more memory with --kv-memory, or ask for less.",
            )
