"""Weights bound to their kernels: each kernel is chosen once, with the reasons kept, and packs its weight once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.kernels.canonical import CanonicalWeight, IntWeight, WeightType
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import TOLERANCES, LinearProblem
from pymllm.kernels.native.addresses import check_memory, unfit
from pymllm.kernels.quantised_rows import QuantisedRows
from pymllm.kernels.registry import Operation, Packed, Selection, select


@dataclass(frozen=True)
class BoundWeight:
    """A packed weight and the kernel that runs it, chosen once."""

    selection: Selection[Any]
    problem: LinearProblem
    packed: Packed
    input_order: Tensor | None = None

    @property
    def nbytes(self) -> int:
        order = 0 if self.input_order is None else self.input_order.nbytes
        return order + sum(tensor.nbytes for tensor in self.packed.values())

    @property
    def tolerance(self) -> float:
        """The relative error that the kernel owns up to; without a word of its own, what the dtype explains."""
        explained = TOLERANCES[self.problem.dtype]
        return getattr(self.selection.kernel, "tolerance", lambda _: explained)(self.problem)

    @property
    def rounds_activations(self) -> bool:
        """True if the kernel owns up to an error beyond what the activations' dtype explains."""
        return self.tolerance > TOLERANCES[self.problem.dtype]

    def run(self, *args: Any) -> Tensor:
        """Call the kernel: (x, bias) for a linear layer, (ids) for an embedding."""
        x = args[0]
        if not isinstance(x, Tensor):
            if not isinstance(x, QuantisedRows) or self.input_order is not None:
                raise unfit("the input of a layer", x, ("*",))
        elif self.input_order is not None:
            check_memory("x", x)  # torch gathers without a look
            args = (x[..., self.input_order], *args[1:])
        return self.selection.kernel.run(self.packed, self.problem, *args)

    def canonical(self) -> CanonicalWeight:
        """Unpack the weight to its canonical layout again."""
        weight = self.selection.kernel.unpack(self.packed, self.problem)
        return replace(weight, input_order=self.input_order) if isinstance(weight, IntWeight) else weight


def bind(weight: CanonicalWeight, execution: Execution, operation: Operation) -> BoundWeight:
    """Choose the kernel for `weight` and pack it.  A plan binds meta tensors, to count bytes without data."""
    input_order = weight.input_order if isinstance(weight, IntWeight) else None
    if isinstance(weight, IntWeight):
        weight = replace(weight, input_order=None)
    selection, problem = choose_kernel(weight.type, weight.shape, execution, operation)
    return BoundWeight(selection, problem, selection.kernel.pack(weight, problem), input_order)


def choose_kernel(
    kind: WeightType, shape: tuple[int, int], execution: Execution, operation: Operation
) -> tuple[Selection[Any], LinearProblem]:
    """Choose the kernel for a weight of this kind and shape, [O, I].  Returns it, and the problem that it solves."""
    out_features, in_features = shape
    problem = LinearProblem(
        kind,
        in_features,
        out_features,
        execution.dtype,
        probe_device(execution.device),
        execution.compute,
    )
    return select(operation, problem, execution.forced_kernel(operation)), problem


def bind_shared(bound: BoundWeight, execution: Execution, operation: Operation) -> BoundWeight:
    """Bind the same weight for another operation, and share the packed tensors where its kernel packs them alike."""
    problem = replace(bound.problem, dtype=execution.dtype, compute=execution.compute)
    selection = select(operation, problem, execution.forced_kernel(operation))
    if selection.kernel.layout == bound.selection.kernel.layout and problem.dtype is bound.problem.dtype:
        return BoundWeight(selection, problem, bound.packed, bound.input_order)
    return bind(bound.canonical(), execution, operation)


def bound_weight(layer: nn.Module) -> BoundWeight | None:
    """Return the layer's packed weight, or None before `process_weights_after_loading`."""
    return getattr(layer, "bound", None)


def bind_layer(layer: Any, weight: CanonicalWeight) -> None:
    """Pack `weight` for the kernel that fits the layer, and keep it there."""
    layer.bound = bind_for(layer, weight)


def bind_for(layer: Any, weight: CanonicalWeight) -> BoundWeight:
    """Pack `weight` for the kernel that fits the layer, and leave the layer as it is."""
    return bind(weight, *bound_as(layer, weight_device(weight)))


def bound_as(layer: Any, device: str) -> tuple[Execution, Operation]:
    """Return how a layer is run, and as what.  device: where its weights are, for a module that does not say."""
    execution = getattr(layer, "execution", None) or Execution(dtype=layer.shape.dtype, device=device)
    return execution, getattr(layer, "operation", "linear")


def weight_device(weight: CanonicalWeight) -> str:
    return str(next(iter(weight.tensors().values())).device)
