"""Prompts as users give them: text or token ids, one or several."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from pymllm.errors import RequestError

Prompt = str | Sequence[int]


def is_prompt(prompts: Any) -> bool:
    """Tell whether this is one prompt: a text, or token ids."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral))


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """List the prompts, of which there may be one, as text or as token ids."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    try:
        return [prompts] if is_prompt(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
    except (TypeError, LookupError):
        raise _no_prompt(prompts) from None


def token_ids_of(prompt: Any) -> list[int]:
    """Read a prompt of token ids, whatever holds them.  RequestError for anything but whole numbers."""
    try:
        return [
            operator.index(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)
        ]
    except TypeError:
        raise _no_prompt(prompt) from None


def _no_prompt(found: Any) -> RequestError:
    return RequestError(
        "a prompt is neither text nor token ids",
        code="prompt",
        tensor="prompt",
        expected="a string, or a sequence of whole numbers",
        found=reprlib.repr(found),
    )
