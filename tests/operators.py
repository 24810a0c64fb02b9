"""The torch operators and native functions that a call runs, counted: what it costs on any machine, however busy.

`benchmarks/cpu_dispatch.py` has the microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NATIVE = ("attention", "float_linear", "integer_linear", "store_kv")


class Operators(TorchDispatchMode):
    """names: the operators of the block, in order.  largest: the bytes of the largest real tensor that they made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and not leaf.is_meta]
        self.largest = max([self.largest, *(tensor.nbytes for tensor in made)])
        return result


def work_of(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the operators and native functions that a second call runs, in order."""
    from pymllm import _native

    call()
    with monkeypatch.context() as patch, Operators() as ran:
        for name in NATIVE:
            function = getattr(_native, name)

            def watched(*arguments: object, name: str = name, function: Any = function) -> object:
                ran.names.append(name)
                return function(*arguments)

            patch.setattr(_native, name, watched)
        call()
    return ran.names
