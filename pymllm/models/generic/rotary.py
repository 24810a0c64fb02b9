"""Our rotation of queries and keys in the attention of transformers' classes, in place of the ten operations of theirs.

A class's attention calls a function of its own file with cosines and sines that a module of the model has made. The
function is tried on numbers, and so is the module: our kernel takes one half of cosines whose halves are alike. It is
our function for this model alone; the file of the class stays as it is.
"""

# T tokens, H heads, D head size

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.layers.elementwise import elementwise_kernel
from pymllm.models.generic.classes import on_cpu, takes

NAME = "apply_rotary_pos_emb"
TRIED = 40  # positions


class Rotation:
    """A function in the place of a class's own.  original: theirs, for whatever it was not tried with."""

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]], kernel: Any) -> None:
        self.original, self.kernel = original, kernel
        self.of: Tensor | None = None
        self.halves: tuple[Tensor, Tensor]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Any:
        """Rotate q and k.  q: [1, H, T, D], k: [1, Hkv, T, D]; cos, sin: [1, T, D].  Returns both."""
        known = not others and not named and cos.ndim == 3 and len(cos) == 1 and cos.dtype is torch.float32
        if not known or any(x.ndim != 4 or x.dtype is not cos.dtype or len(x) != 1 for x in (q, k)):
            return self.original(q, k, cos, sin, *others, **named)
        if any(x.shape[2:] != cos.shape[1:] for x in (q, k)):
            return self.original(q, k, cos, sin, *others, **named)
        if self.of is not cos:  # the same for all layers of a step
            half = cos.shape[-1] // 2
            self.of, self.halves = cos, (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return self._rotate(q), self._rotate(k)

    def _rotate(self, x: Tensor) -> Tensor:
        return self.kernel.rotate(x[0].transpose(0, 1), *self.halves).transpose(0, 1)[None]


def put_rotations(model: nn.Module, attention: Iterable[str], dtype: torch.dtype) -> None:
    """Have attention modules rotate by our kernel, where their own function is shown to compute the same.

    attention: their names.  dtype: of activations; in 16 bits theirs rounds several times, and is left alone.
    """
    if dtype is not torch.float32 or not halves_are_alike(model):
        return
    forwards: dict[Any, Any] = {}
    for name in attention:
        module = model.get_submodule(name)
        forward: Any = type(module).forward
        if forward not in forwards:
            forwards[forward] = _with_rotation(forward) if takes(module, "position_embeddings") else None
        if forwards[forward] is not None:
            module.forward = types.MethodType(forwards[forward], module)


def _with_rotation(forward: Any) -> Any:
    """Return a class's forward with our function in the place of its own.  None: it has none, or another."""
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    original = forward.__globals__.get(NAME)
    if NAME not in forward.__code__.co_names or original is None or not rotates_halves(original):
        return None
    names = {**forward.__globals__, NAME: Rotation(original, elementwise_kernel())}
    made = types.FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@on_cpu
def rotates_halves(function: Any) -> bool:
    """Tell whether a function rotates as our kernel does, by a trial."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn((1, heads, 5, 8), generator=draw) for heads in (3, 2))
    angles = torch.randn((5, 4), generator=draw)
    cos, sin = (of(torch.cat((angles, angles), -1))[None] for of in (torch.cos, torch.sin))
    try:
        found = function(q.clone(), k.clone(), cos, sin)
    except Exception:
        return False
    if not isinstance(found, tuple) or len(found) != 2:
        return False
    for x, theirs in zip((q, k), found, strict=True):
        ours = (
            TorchElementwise().rotate(x[0].transpose(0, 1), angles.cos(), angles.sin()).transpose(0, 1)[None]
        )
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
            return False
        if not torch.allclose(theirs, ours, rtol=1e-6, atol=1e-6):
            return False
    return True


@on_cpu
def halves_are_alike(model: nn.Module) -> bool:
    """Tell whether all modules that make cosines and sines of positions make two like halves, by a trial of each."""
    found = False
    for module in model.modules():
        if not hasattr(module, "inv_freq"):
            continue
        found = True
        try:
            made = module(torch.zeros(1), torch.arange(TRIED)[None])
        except Exception:
            return False
        if not isinstance(made, tuple) or len(made) != 2:
            return False
        for table in made:
            first, second = table.chunk(2, dim=-1) if table.shape[-1] % 2 == 0 else (table, None)
            if second is None or not torch.equal(first, second):
                return False
    return found
