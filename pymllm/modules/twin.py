"""Twins of other libraries' modules: copies with other weights, which are run to prove what a module computes."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TRIED = (4, 6, 8, 10, 12)  # of small sizes
# Elements of weights up to which a module is run in its own size, where a smaller copy cannot.
ALL_SIZES = 1 << 24
TOLERANCE = 1e-5  # relative; some modules compute in float32 whatever they are given


def twin_of(
    module: nn.Module, parameters: Mapping[str, Tensor | None], replaced: Mapping[int, int] | None = None
) -> nn.Module:
    """Copy a module without its own parameters, hooks and buffers; submodules are shared.

    parameters: those of the copy.  replaced: new values for attributes that are such numbers, as sizes are.
    """
    twin: nn.Module = object.__new__(type(module))
    held = {
        name: type(value)() if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") else value
        for name, value in vars(module).items()
    }
    for name, value in held.items():
        if replaced and type(value) is int and value in replaced:
            held[name] = replaced[value]
    held |= {
        "_parameters": dict(parameters),
        "_buffers": dict(module._buffers),
        "_modules": dict(module._modules),
    }
    config: Any = held.get("config")
    if hasattr(config, "_experts_implementation"):  # the module's own forward, not one for a device or a size
        held["config"] = config = copy.copy(config)
        config._experts_implementation = "eager"
    twin.__dict__.update(held)
    return twin


@torch.no_grad()
def answer(twin: nn.Module, *args: Any, **kwargs: Any) -> Tensor | str:
    """Call a twin, and return its answer, or why there is none."""
    try:
        with torch.random.fork_rng(devices=[]):
            found = twin(*args, **kwargs)
    except Exception as error:  # whatever another library's code may raise
        said = str(error).strip().splitlines()
        return f"its forward cannot be tried by itself: {type(error).__name__}: {said[0] if said else ''}".rstrip(
            ": "
        )
    return (
        found if isinstance(found, Tensor) else f"its forward returns a {type(found).__name__}, not a tensor"
    )


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward, without those that only take what is left."""
    signature = inspect.signature(type(module).forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in signature.parameters.items() if p.kind in kinds)[1:]


def near(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two answers are equal but for rounding, row by row."""
    if found.shape != expected.shape:
        return False
    error = (found.double() - expected.double()).abs()
    return bool((error <= TOLERANCE * expected.double().abs().amax(-1, keepdim=True)).all())


def shrunk(experts: int, hidden: int, intermediate: int) -> tuple[int, int, int] | None:
    """Choose small sizes of experts of which those are equal that are equal in the module; None: none are found.

    Where a module keeps its sizes as numbers, only so can each be replaced by one other.
    """

    def alike(e: int, h: int, i: int) -> tuple[bool, ...]:
        return e == h, e == i, e == 2 * i, h == i, h == 2 * i

    wanted = alike(experts, hidden, intermediate)
    small = ((e, h, i) for e, h, i in itertools.product(TRIED, repeat=3) if alike(e, h, i) == wanted)
    return next(small, None)
