"""What kernels for the experts of a layer are given, and what they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pymllm.kernels.canonical import ExpertsWeight
from pymllm.kernels.gated_activation import GatedActivation
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Compute, Kernel, Packed


@dataclass(frozen=True)
class ExpertsProblem:
    """One rank's experts of one layer, each `down(activation(gate_up(x)))`, as a kernel sees them.

    gate_up: the product of one expert, [2·I, H]; or two, gate's and up's, where they are not one weight.
    down: [H, I].  num_experts: how many this rank holds.
    reordered: weights may have an `input_order`, another one for each expert, which `pack` must keep.
    """

    gate_up: tuple[LinearProblem, ...]
    down: LinearProblem
    num_experts: int
    activation: GatedActivation
    reordered: bool = False

    def products(self) -> dict[str, LinearProblem]:
        """The products by name, as `ExpertsWeight.products`."""
        names = ("gate_up",) if len(self.gate_up) == 1 else ("gate", "up")
        return {**dict(zip(names, self.gate_up, strict=True)), "down": self.down}

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
    """gate_up: [E, 2·I], the gate's first; down: [E, H].  None: there is none."""

    gate_up: Tensor | None = None
    down: Tensor | None = None


class ExpertsKernel(Kernel, Protocol):
    """The experts of a layer over packed weights: routed tokens in, their weighted sum out.

    `pack` is given one canonical weight an expert and product, and may use the packing of a linear kernel for each;
    `kernels/linear_experts.py` does, for every linear kernel there is.
    """

    layout: str

    def numerics(self, problem: ExpertsProblem) -> str:
        """As a linear kernel's; `tolerance(problem)` too."""

    def pack(self, weight: ExpertsWeight, problem: ExpertsProblem) -> Packed:
        """The weights of all experts in this kernel's own order.  Also runs on meta tensors."""

    def unpack(self, packed: Packed, problem: ExpertsProblem) -> ExpertsWeight:
        """What `pack` was given, bit for bit."""

    def run(
        self,
        packed: Packed,
        problem: ExpertsProblem,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bias: ExpertsBias,
    ) -> Tensor:
        """x: [T, H] in the problem's dtype.  topk_ids: [T, K] int64, which of the packed experts; below 0: none.
        topk_weights: [T, K] float32.  Returns [T, H] in the problem's dtype: for each token, the sum over its K
        experts of weight times answer, accumulated in float32.  T and K may be 0, and an expert may come up twice."""
