"""The linear kernels of weight-only formats: a format adds its packing and its coding."""

# T tokens, O out_features, I in_features

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Packed
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.linear_cases import linear_cases
from pymllm.kernels.triton.weight_only import Operands, weight_only_linear
from pymllm.kernels.triton.words import Order, order_for


def order_of(problem: LinearProblem) -> Order:
    """Return the order in which the words of a weight lie on the problem's device."""
    return order_for(problem.in_features, problem.device.architecture)


class WeightOnlyLinear(ABC):
    """The product x @ weight.T, the weight expanded as it is read."""

    device_type = "cuda"  # the only one it runs on
    name: str
    layout: str

    @abstractmethod
    def why_not(self, problem: LinearProblem) -> str | None: ...

    @abstractmethod
    def pack(self, weight: CanonicalWeight, problem: LinearProblem) -> Packed: ...

    @abstractmethod
    def unpack(self, packed: Packed, problem: LinearProblem) -> CanonicalWeight: ...

    @abstractmethod
    def coding(self, packed: Packed, problem: LinearProblem) -> str:
        """Return the name of the `Coding` by which the packed words become numbers."""

    @abstractmethod
    def examples(self) -> Sequence[CanonicalWeight]:
        """Make weights on meta, one for each thing that makes kernels differ: these are compiled ahead of time."""

    def numerics(self, problem: LinearProblem) -> str:
        return "numbers before scales exact in the activations' dtype, sums and scales in float32"

    def operands(self, packed: Packed) -> Operands:
        """Return the packed tensors as kernels read them; those of several experts at once too."""
        return Operands(packed["words"], packed["scales"], packed.get("zeros"), packed.get("row_scales"))

    def run(self, packed: Packed, problem: LinearProblem, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.operands(packed)
        return weight_only_linear(
            x,
            weight.words,
            weight.scales,
            weight.zeros,
            weight.row_scales,
            bias,
            self.coding(packed, problem),
            problem.device.spec,
        )

    def cases(self, device: Device) -> Iterator[Case]:
        return linear_cases(self, device, self.examples())
