"""Modules of other libraries that multiply by one matrix or look rows up, and proof of what else they do.

A class that has the forward of `nn.Linear` or `nn.Embedding` is what it says. A subclass with a forward of its own is
run, and is taken where it computes the same: the rows of an embedding times one number, as Gemma's are, count as that.
So are transformers' `Conv1D`, whose weight lies [I, O], and stacks of linear layers that take the rows of one expert
after the other.
"""

# O out_features, I in_features, V vocabulary, H hidden size, E experts

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pymllm.modules.twin import ALL_SIZES, answer, arguments_of, near, shrunk, twin_of

OWN = "it has a forward of its own, which a replacement would lose"
NARROW = 8  # the width of the table in which every row is looked up
CHUNK = 1 << 16  # rows looked up at a time


@dataclass(frozen=True)
class ForeignMatrix:
    """The way in which a module uses its weight.

    kind: "linear", "embedding", or "stack": linear layers of several experts in one tensor, [E, O, I].
    transposed: the weight is [I, O].  scale: of an embedding's rows; rounded: in the rows' dtype first.
    """

    kind: Literal["linear", "embedding", "stack"]
    transposed: bool = False
    scale: float = 1.0
    rounded: bool = False

    def matrix(self, module: nn.Module) -> Tensor:
        """Return the module's weight as [O, I], of an embedding as [V, H], of a stack as [E, O, I]."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight.transpose(-1, -2) if self.transposed else weight

    def scaled(self, rows: Tensor) -> Tensor:
        """Multiply an embedding's rows by its scale, as the module does it in the rows' dtype."""
        if self.scale == 1:
            return rows
        return rows * (float(torch.tensor(self.scale, dtype=rows.dtype)) if self.rounded else self.scale)


def is_matrix(module: nn.Module) -> bool:
    """Tell whether a module is of a kind that `read_matrix` knows."""
    return isinstance(module, (nn.Linear, nn.Embedding)) or _is_conv1d(module) or _is_stack(module)


def read_matrix(module: nn.Module) -> ForeignMatrix | str:
    """Say what a module, for which `is_matrix` is true, does with its weight, or why it is not replaced."""
    if isinstance(module, nn.Linear):
        facts, plain = ForeignMatrix("linear"), type(module).forward is nn.Linear.forward
    elif isinstance(module, nn.Embedding):
        facts, plain = ForeignMatrix("embedding"), type(module).forward is nn.Embedding.forward
    elif _is_conv1d(module):
        facts, plain = ForeignMatrix("linear", transposed=True), False
    else:
        facts, plain = ForeignMatrix("stack"), False
    weight = module._parameters.get("weight")
    if (
        not isinstance(weight, Tensor)
        or is_lazy(weight)
        or weight.ndim != (3 if facts.kind == "stack" else 2)
    ):
        return "its weight holds no floats in rows and columns"
    if plain:
        return facts
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if strange := held - {"weight", "bias"}:
        return f"{OWN}; {min(strange)} takes part in it"
    proofs = {"linear": _prove_linear, "embedding": _prove_embedding, "stack": _prove_stack}
    found = proofs[facts.kind](module, facts)
    return f"{OWN}: {found}" if isinstance(found, str) else found


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers', without importing it


def _is_stack(module: nn.Module) -> bool:
    """Tell whether a module's only parameter is a stack, and its forward takes rows and how many each expert has."""
    held = [name for name, parameter in module._parameters.items() if parameter is not None]
    return held == ["weight"] and module._parameters["weight"].ndim == 3 and len(arguments_of(module)) == 2  # type: ignore[union-attr]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def _prove_linear(module: nn.Module, facts: ForeignMatrix) -> ForeignMatrix | str:
    """Compare small copies of a module, or one of its own size, with `F.linear`."""
    sides = outputs, inputs = tuple(facts.matrix(module).shape)
    small = shrunk(0, outputs, inputs)
    reason = ""
    for o, i in [small[1:]] * (small is not None) + [sides] * (outputs * inputs <= ALL_SIZES):  # type: ignore[index]
        weight, bias = _random(o, i), None if module._parameters.get("bias") is None else _random(o)
        held = {"weight": weight.t().contiguous() if facts.transposed else weight, "bias": bias}
        twin = twin_of(module, held, {outputs: o, inputs: i})
        found: Tensor | str = ""
        for x in (_random(5, i) * 9, _random(2, 3, i)):
            found = answer(twin, x)
            if isinstance(found, str) or not near(found, F.linear(x, weight, bias)):
                reason = reason or (
                    found if isinstance(found, str) else "its answers are not those of a linear layer"
                )
                break
        else:
            return facts
    return reason


def _prove_embedding(module: nn.Module, facts: ForeignMatrix) -> ForeignMatrix | str:
    """Look every row up in a copy of a module, and find the number that it multiplies all of them by.

    The copy's rows overlap in memory, so that a large vocabulary takes no more of it than a small one.
    """
    size, width = facts.matrix(module).shape
    every = torch.arange(size)
    sample = every[torch.linspace(0, size - 1, min(size, 64)).long()]
    scale: float | None = None
    for columns, chunks in ((NARROW, every.split(CHUNK)), (width, (sample.view(1, -1),))):
        table = _random(size + columns).as_strided((size, columns), (1, 1))
        twin = twin_of(module, {"weight": table}, {width: columns})
        for ids in chunks:
            found, rows = answer(twin, ids), F.embedding(ids, table)
            if isinstance(found, str):
                return found
            if scale is None and found.numel():
                scale = float(found.flatten()[0].double() / rows.flatten()[0])
            if found.shape != rows.shape or not torch.allclose(
                found.double(), rows * (scale or 1), 1e-6, 1e-9
            ):
                return "its answers are not its rows times one number"
    made = [
        replace(facts, scale=_exactly(module, scale or 1.0), rounded=rounded) for rounded in (False, True)
    ]
    table = _random(size + width).bfloat16().as_strided((size, width), (1, 1))
    found = answer(twin_of(module, {"weight": table}), sample)
    rows = F.embedding(sample, table)
    alike = (each for each in made if isinstance(found, Tensor) and torch.equal(found, each.scaled(rows)))
    return next(alike, "its answers in bfloat16 are rounded in a way of its own")


def _exactly(module: nn.Module, measured: float) -> float:
    """Return the module's own number that was measured, where it has one: a quotient is off by its last bit."""
    held = [*vars(module).values(), *module._buffers.values()]
    numbers = [v.item() if isinstance(v, Tensor) and v.numel() == 1 and not v.is_meta else v for v in held]
    exact = (float(v) for v in (1.0, *numbers) if isinstance(v, (int, float)))
    return next((v for v in exact if abs(v - measured) <= 1e-6 * abs(measured)), measured)


def _prove_stack(module: nn.Module, facts: ForeignMatrix) -> ForeignMatrix | str:
    """Compare a small copy of a module with linear layers of its experts, one after the other."""
    own = experts, outputs, inputs = tuple(module.weight.shape)  # type: ignore[arg-type]
    small = shrunk(experts, outputs, inputs)
    if small is None:
        return "no smaller copy of it can be made"
    e, o, i = small
    weight, sizes = _random(e, o, i), [(2 * index) % 5 for index in range(e)]
    x = _random(sum(sizes), i)
    found = answer(twin_of(module, {"weight": weight}, dict(zip(own, small, strict=True))), x, sizes)
    if isinstance(found, str):
        return found
    parts = zip(x.split(sizes), weight, strict=True)
    expected = torch.cat([F.linear(rows, one) for rows, one in parts])
    return facts if near(found, expected) else "its answers are not those of one linear layer an expert"
