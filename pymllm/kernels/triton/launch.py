"""Device functions that are compiled when first launched, and the record of a launch.

A file of kernels is imported on machines without Triton too: `@kernel` and `@inline` keep the Python function, and
hand it to `triton.jit` on first use. In their bodies `tl` is `triton.language`.

On meta tensors nothing is launched. Inside `recording()` every launch is noted instead, with the very arguments and
constants of a real one. So a kernel's own `run` says what to compile ahead of time.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any, overload

import torch

from pymllm.errors import MissingExtraError
from pymllm.kernels.triton.bound import BoundLaunches


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments in order, and its constants (options such as num_warps included)."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded_launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches in the list instead of making them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


@functools.cache
def interpreting() -> bool:
    """Tell whether Triton's interpreter runs the kernels, on the CPU.  Triton reads the variable on its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


class DeviceFunction:
    """A Python function that `triton.jit` compiles on first use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        self.settings: dict[str, Any] = {}  # of `triton.jit`
        self.__doc__ = function.__doc__

    def __reduce__(self) -> tuple[Any, ...]:
        return _find, (self.function.__module__, self.name)

    @functools.cached_property
    def compiled(self) -> Any:
        """The function as `triton.jit` makes it.  Raises MissingExtraError without Triton."""
        try:
            import triton
            import triton.language
        except ImportError:
            raise MissingExtraError("triton", "triton", "running a GPU kernel") from None
        # A copy with globals of its own: for a kernel, and for it alone, inline functions are what Triton made of them.
        names = dict(self.function.__globals__, tl=triton.language)
        for name in self.function.__code__.co_names:
            if isinstance(names.get(name), Inline):
                names[name] = names[name].compiled
        copy = FunctionType(self.function.__code__, names, self.name)
        copy.__annotations__, copy.__qualname__ = self.function.__annotations__, self.function.__qualname__
        return triton.jit(copy, **self.settings)


def _find(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


class Inline(DeviceFunction):
    """A device function that kernels call."""

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.name} is device code: only kernels call it")


class Kernel(DeviceFunction):
    """A device function that is launched over a grid.

    varying: arguments that differ from step to step. One binary serves all their values: it is not specialised on
    whether they are 1 or multiples of 16, nor, where they are tensors, on their alignment.
    """

    def __init__(self, function: Callable[..., Any], varying: tuple[str, ...] = ()) -> None:
        super().__init__(function)
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        unknown = [name for name in varying if name not in names]
        if unknown:
            raise TypeError(f"{self.name} has no argument {' or '.join(unknown)}; it has {', '.join(names)}")
        self.varying = frozenset(varying)
        self.varies = tuple(name in self.varying for name in names)
        self.settings = {"do_not_specialize": sorted(varying)}

    @functools.cached_property
    def bound(self) -> BoundLaunches:
        return BoundLaunches(self.compiled, self.varying)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch over the grid.  arguments: a tensor first.  constants: all that are known when compiling."""
        # Asked when recording, too, so that every launch that is compiled ahead of time is known to have it.
        is_meta, recorded = arguments[0].is_meta, _recorded.get()
        if recorded is not None:
            recorded.append(Launch(self, grid, arguments, constants))
        elif not is_meta:
            with torch.cuda.device_of(arguments[0]):  # Triton launches on the thread's current GPU
                self.bound.launch(grid, arguments, constants)


@overload
def kernel(function: Callable[..., Any], /) -> Kernel: ...
@overload
def kernel(*, varying: tuple[str, ...]) -> Callable[[Callable[..., Any]], Kernel]: ...
def kernel(function: Callable[..., Any] | None = None, /, *, varying: tuple[str, ...] = ()) -> Any:
    """Make a kernel of the decorated function.  varying: as in `Kernel`."""
    return functools.partial(Kernel, varying=varying) if function is None else Kernel(function)


def inline(function: Callable[..., Any]) -> Inline:
    return Inline(function)
