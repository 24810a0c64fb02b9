"""Greedy answers, which the tests of the engine compare."""

from __future__ import annotations

from typing import Any

from pymllm import LLM, SamplingParams


def greedy(count: int, **settings: Any) -> SamplingParams:
    """Return the parameters of a greedy answer of just so many tokens."""
    return SamplingParams(max_tokens=count, ignore_eos=True, **settings)


def answers(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | None = None, **options: Any
) -> list[tuple[int, ...]]:
    """Return the tokens of each prompt's answer: greedy ones of 40 tokens, unless params differ."""
    return [output.token_ids for output in llm.generate(prompts, params or greedy(40), **options)]
