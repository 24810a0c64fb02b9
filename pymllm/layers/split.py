"""A fused layer whose parts have different methods: it keeps separate weights and puts their outputs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.layers.held import RevisedModule
from pymllm.quantization.method import LinearMethodBase, QuantizeMethodBase
from pymllm.quantization.parameters import load_into

if TYPE_CHECKING:
    from pymllm.layers.weighted import WeightedLayer


class PartHolder(RevisedModule):
    """The weights of one part of a split layer."""

    operation: ClassVar[str] = "linear"
    kind: ClassVar[str] = "linear"

    def __init__(self, layer: WeightedLayer, index: int, quant_method: LinearMethodBase) -> None:
        super().__init__()
        self.shape = layer.shape.part(index)
        self.execution, self.params_dtype = layer.execution, layer.params_dtype
        self.prefix, self.quant_method = self.shape.parts[0], quant_method

    def weight_loader(self, param: Tensor, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        """Cut a full checkpoint tensor for this rank and write it to `param`, as `WeightedLayer.weight_loader` does."""
        load_into(param, loaded_weight, None, self.prefix)


@dataclass(frozen=True)
class SplitLinearMethod(QuantizeMethodBase):
    """The methods of a split layer's parts.

    Each part lives in a child module of the layer, named `part_0`, `part_1`, ...
    """

    methods: tuple[LinearMethodBase, ...]
    name: ClassVar[str] = "split"

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of every part, in a module of its own."""
        for index, method in enumerate(self.methods):
            holder = PartHolder(layer, index, method)  # type: ignore[arg-type]
            layer.add_module(f"part_{index}", holder)
            size = output_partition_sizes[index]
            method.create_weights(
                holder, input_size_per_partition, [size], input_size, size, params_dtype, **extra_weight_attrs
            )

    def holders(self, layer: nn.Module) -> list[PartHolder]:
        """Return the modules that hold the parts' weights, in order."""
        return [getattr(layer, f"part_{index}") for index in range(len(self.methods))]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bind every part to a kernel.  A second call does nothing."""
        for method, holder in zip(self.methods, self.holders(layer), strict=True):
            method.process_weights_after_loading(holder)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Multiply by every part.  x: [*, I_local].  Returns [*, O_local], the parts' outputs side by side."""
        outputs = [
            m.apply(holder, x, None) for m, holder in zip(self.methods, self.holders(layer), strict=True)
        ]
        y = torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias

    def describe(self) -> str:
        """Name the methods of the parts, for people."""
        return " | ".join(method.describe() for method in self.methods)
