"""The layers that `quantize_model` puts in place of a module's own: they have packed weights and the same forward."""

# O out_features, I in_features, E experts

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import Execution
from pymllm.kernels.native.addresses import floats_in, unfit
from pymllm.kernels.registry import Operation, kernels_for
from pymllm.layers.weighted import WeightedLayer
from pymllm.modules.foreign_matrices import ForeignMatrix
from pymllm.modules.packed import PackedBuffers, moved
from pymllm.parallel import Parallel
from pymllm.quantization.binding import BoundWeight, bind
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape


class QuantizedLayer(PackedBuffers, WeightedLayer):
    """A layer whose packed weight takes the place of a module's own."""

    bound: BoundWeight

    def __init__(
        self,
        prefix: str,
        shape: LinearShape,
        method: LinearMethodBase,
        execution: Execution,
        bound: BoundWeight,
    ) -> None:
        with execution, Parallel():
            super().__init__(prefix, shape.dtype)
        self.shape, self.quant_method = shape, method
        self.in_features, self.out_features = shape.in_features, shape.out_features
        self._hold(bound, execution)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, decoded anew each time: for code that reads a module's weight besides calling it."""
        return self.bound.canonical().dequantize(self.bound.problem.dtype)

    def extra_repr(self) -> str:
        kernel = self.bound.selection.kernel.name
        return f"{self.out_features} x {self.in_features}, {self.quant_method.describe()} -> {kernel}"

    def _operation(self) -> Operation:
        return "embedding" if self.operation == "embedding" else "linear"

    def _tensors(self) -> dict[str, Tensor]:
        order = {} if self.bound.input_order is None else {"input_order": self.bound.input_order}
        return {**self.bound.packed, **order}

    def _described(self) -> dict[str, Any]:
        bound = self.bound
        return {
            "weight": str(bound.problem.weight),
            "shape": [bound.problem.out_features, bound.problem.in_features],
            "kernel": bound.selection.kernel.name,
            "dtype": str(bound.problem.dtype).removeprefix("torch."),
        }

    def _bind_again(self, execution: Execution, device: torch.device) -> BoundWeight:
        return bind(moved(self.bound.canonical(), device), execution, self._operation())

    def _read(self, saved: dict[str, Tensor], said: dict[str, Any]) -> BoundWeight:
        bound = self.bound
        kernel = self._known(said["kernel"], {k.name: k for k in kernels_for(self._operation())})
        order = saved.pop("input_order", None)
        dtype = getattr(torch, said["dtype"])
        if kernel.name == bound.selection.kernel.name and dtype is bound.problem.dtype:
            self._same_tensors(saved, bound.packed)
            return replace(bound, packed=saved, input_order=order)
        weight = kernel.unpack(saved, replace(bound.problem, dtype=dtype))
        if order is not None:
            weight = replace(weight, input_order=order)
        assert self.execution is not None
        return bind(weight, self.execution, self._operation())


class QuantizedLinear(QuantizedLayer):
    """A packed weight behind the forward of nn.Linear."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Multiply the only argument, whatever its name: x [*, I] of any float dtype.  Returns [*, O] in that dtype."""
        (x,) = *args, *named.values()
        dtype = self.bound.problem.dtype
        if not isinstance(x, Tensor):
            raise unfit("x", x, ("*", self.in_features), "floats")
        inputs = x if x.dtype is dtype else floats_in("x", x, dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        y = self.quant_method.apply(self, inputs, bias)
        return (self.add_lora(inputs, y) if self.adapters else y).to(x.dtype)


class QuantizedEmbedding(QuantizedLayer):
    """A packed table behind the forward of nn.Embedding, or of one that scales its rows.

    facts: how the replaced module scales.
    """

    kind: ClassVar[str] = "embedding"
    operation: ClassVar[Operation] = "embedding"
    facts: ForeignMatrix = ForeignMatrix("embedding")

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Look up rows by the only argument, whatever its name: ids of any shape.  Returns [*ids.shape, H]."""
        (ids,) = *args, *named.values()
        rows = self.quant_method.embed(self, ids)
        return self.facts.scaled(self.add_lora_rows(ids, rows) if self.adapters else rows)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.facts.scale == 1 else f", rows times {self.facts.scale:g}")


class QuantizedStack(nn.Module):
    """Linear layers of all experts behind a forward that takes the rows of one expert after the other."""

    def __init__(self, experts: Sequence[QuantizedLinear]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(experts)

    @property
    def weight(self) -> Tensor:
        """The weights as floats, [E, O, I], decoded anew each time."""
        return torch.stack([expert.weight for expert in self.experts])  # type: ignore[misc]

    def forward(self, inputs: Tensor, expert_size: Sequence[int] | Tensor) -> Tensor:
        """Multiply each expert's rows.  inputs: [N, I].  expert_size: [E], how many each has.  Returns [N, O]."""
        sizes = expert_size.tolist() if isinstance(expert_size, Tensor) else list(expert_size)
        parts = inputs.split(sizes)
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, parts, strict=True)])


def quantized_layers(module: nn.Module) -> Iterator[QuantizedLayer]:
    """Yield the linear layers and embeddings that `quantize_model` has put into `module`."""
    for child in module.modules():
        if isinstance(child, QuantizedLayer):
            yield child
