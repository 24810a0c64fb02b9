"""Host functions as torch operators, for `torch.compile`.  Elsewhere they are called directly: dispatch costs time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_library = torch.library.Library("pymllm", "FRAGMENT")
F = TypeVar("F", bound=Callable[..., Any])


def operator(schema: str, meta: Callable[..., Any]) -> Callable[[F], F]:
    """Register the decorated function as `torch.ops.pymllm.<name>`.

    schema: "name(Tensor x, ...) -> Tensor".  meta: makes the results without data, from the same arguments.
    The operator is registered for the CPU too, for Triton's interpreter.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, meta, "Meta")

    def register(function: F) -> F:
        _library.impl(name, function, "CUDA")
        _library.impl(name, function, "CPU")
        overload = getattr(torch.ops.pymllm, name).default

        def call(*arguments: Any) -> Any:
            return overload(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return call  # type: ignore[return-value]

    return register
