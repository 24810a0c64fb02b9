"""Our gated MLP in the places of modules that compute one, as a trial on a small copy of each of them shows."""

# I intermediate size

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.kernels.gated_activation import GatedActivation
from pymllm.layers.mlp import GATED
from pymllm.models.generic.classes import on_cpu
from pymllm.models.generic.layers import is_plain_linear
from pymllm.models.generic.probe import Probe

SMALL, INNER, ROWS = 5, 6, 64  # of the copy: hidden and intermediate size; rows to try
SPREAD = 8  # wide enough to show a limit on the gate


@dataclass(frozen=True)
class Gated:
    """The parts of a gated MLP, by their names in it.

    gate_up: gate and up, or the one layer that has both.  act: between the products.  down: the second product.
    """

    gate_up: tuple[str, ...]
    act: str
    down: str


class GenericGatedMLP(nn.Module):
    """A gated MLP of transformers', called with the rows alone."""

    def __init__(self, gate_up: nn.Module, act: nn.Module, down: nn.Module, names: tuple[str, str]) -> None:
        super().__init__()
        self.add_module(names[0], gate_up)
        self.act = act
        self.add_module(names[1], down)
        self.names = names

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Compute the MLP of the one argument, [*, H].  Returns [*, H]."""
        (x,) = (*args, *named.values())
        gate_up, down = (self._modules[name] for name in self.names)
        assert gate_up is not None and down is not None
        return down(self.act(gate_up(x), down))


@on_cpu
def find_gated(module: Any, name: str, found: Probe) -> Gated | None:
    """Find the parts of a module that computes a gated MLP, and nothing else.  None: it computes something else."""
    linears = {n: child for n, child in module._modules.items() if is_plain_linear(child)}
    others = [child for n, child in module._modules.items() if n not in linears and child is not None]
    paths = {n: f"{name}.{n}" for n in linears}
    if len(linears) not in (2, 3) or module._parameters or module._buffers:
        return None
    if any(True for child in others for _ in itertools.chain(child.parameters(), child.buffers())):
        return None
    if set(found.given.get(name, ())) != {1} or any(
        len(found.inputs.get(p, ())) != 1 for p in paths.values()
    ):
        return None
    if any(child.weight.dtype is not next(iter(linears.values())).weight.dtype for child in linears.values()):
        return None
    for gate_up, down in _orders(linears):
        act = _try(module, gate_up, down)
        if act is not None:
            return Gated(gate_up, act, down)
    return None


def _orders(linears: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the parts that the linear layers may be, as far as their sizes allow."""
    for *first, down in itertools.permutations(linears):
        sizes = {(linears[n].in_features, linears[n].out_features) for n in first}
        if len({linears[n].bias is None for n in first}) > 1:
            continue
        halves = 2 // len(first)
        inner, outer = linears[down].in_features, linears[down].out_features
        if sizes == {(outer, halves * inner)}:
            yield tuple(first), down


def _try(module: Any, gate_up: tuple[str, ...], down: str) -> str | None:
    """Find the activation with which a small copy computes what ours would.  None: there is none."""
    draw = torch.Generator().manual_seed(0)

    def small(inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs, dtype=torch.float32)
        for param in layer.parameters():
            param.requires_grad_(False).copy_(torch.randn(param.shape, generator=draw))
        return layer

    up_size = INNER * 2 // len(gate_up)
    layers = {n: small(SMALL, up_size) for n in gate_up} | {down: small(INNER, SMALL)}
    tried = copy.copy(module)
    tried.__dict__["_modules"] = {**module._modules, **layers}
    x = SPREAD * torch.randn((1, ROWS, SMALL), generator=draw)
    try:
        with torch.no_grad():
            result = tried(x.clone())
    except Exception:
        return None
    both = torch.cat([layers[n](x) for n in gate_up], dim=-1)
    for kind in GATED:
        expected = layers[down](GatedActivation(kind)(both))  # type: ignore[arg-type]
        alike = isinstance(result, Tensor) and result.shape == expected.shape
        if alike and torch.allclose(result, expected, rtol=1e-5, atol=1e-5):
            return kind
    return None
