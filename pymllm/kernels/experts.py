"""The contract of kernels for the experts of a layer: their problem, weights and biases, and the kernel's interface.

An expert computes `down(activation(gate_up(x)))`. Its products are gate_up and down, or gate, up and down.
"""

# T tokens, K experts a token, E experts, H hidden size, I intermediate size

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Compute, Kernel, Packed

Product = TypeVar("Product")


def _by_name(gate_up: tuple[Product, ...], down: Product) -> dict[str, Product]:
    names = ("gate_up",) if len(gate_up) == 1 else ("gate", "up")
    return {**dict(zip(names, gate_up, strict=True)), "down": down}


class LazyWeights(Sequence[CanonicalWeight]):
    """A sequence of `size` weights, each made by `make(index)` whenever it is asked for."""

    def __init__(self, make: Callable[[int], CanonicalWeight], size: int) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(index)


@dataclass(frozen=True)
class ExpertsWeight:
    """The experts of a layer: for each of their products, one weight an expert, all of one type and shape.

    gate_up: one product, [2·I, H] with the gate's outputs first; or two, gate's and up's, where they are stored in
    ways that cannot be one weight.  down: [H, I].  The sequences may make a weight when it is asked for: take each
    once, and keep no reference to it, so that a layer is never held twice.
    """

    gate_up: tuple[Sequence[CanonicalWeight], ...]
    down: Sequence[CanonicalWeight]

    @property
    def num_experts(self) -> int:
        return len(self.down)

    def products(self) -> dict[str, Sequence[CanonicalWeight]]:
        """Return the products by name."""
        return _by_name(self.gate_up, self.down)


@dataclass(frozen=True)
class ExpertsProblem:
    """One rank's experts of one layer, as a kernel sees them.

    gate_up: the product of one expert, [2·I, H]; or two, gate's and up's, where they are not one weight.
    down: [H, I].  num_experts: how many experts this rank holds.
    reordered: weights may have an `input_order`, another one for each expert, which `pack` must keep.
    """

    gate_up: tuple[LinearProblem, ...]
    down: LinearProblem
    num_experts: int
    activation: GatedActivation
    reordered: bool = False

    def products(self) -> dict[str, LinearProblem]:
        """Return the products by name, as `ExpertsWeight.products` does."""
        return _by_name(self.gate_up, self.down)

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    @property
    def device(self) -> Device:
        return self.down.device

    @property
    def compute(self) -> Compute:
        return self.down.compute


class ExpertsBias(NamedTuple):
    """The biases of a layer's experts.  gate_up: [E, 2·I], the gate's first; down: [E, H].  None: there is none."""

    gate_up: Tensor | None = None
    down: Tensor | None = None


class ExpertsKernel(Kernel, Protocol):
    """A kernel for the experts of a layer over packed weights: routed tokens in, their weighted sum out.

    `pack` is given one canonical weight for each expert and product, and may use the packing of a linear kernel for
    each; `kernels/linear_experts.py` does, for every linear kernel that there is.
    """

    layout: str

    def numerics(self, problem: ExpertsProblem) -> str:
        """Say how results differ from exact arithmetic, as a linear kernel does; `tolerance(problem)` likewise."""

    def pack(self, weight: ExpertsWeight, problem: ExpertsProblem) -> Packed:
        """Bring the weights of all experts into this kernel's own order.  Also runs on meta tensors."""

    def unpack(self, packed: Packed, problem: ExpertsProblem) -> ExpertsWeight:
        """Return what `pack` was given, bit for bit."""

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        """Compute each token's weighted sum over its experts, accumulated in float32.

        x: [T, H] in the problem's dtype.  topk_ids: [T, K] int64, indices of the packed experts; below 0: none.
        topk_weights: [T, K] float32.  Returns [T, H] in the problem's dtype: for each token, the sum over its K experts
        of weight times answer.  T and K may be 0, and an expert may come up twice.
        """
