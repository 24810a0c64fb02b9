"""Linear layers: sharded over tensor-parallel ranks, with weights in any format.

A layer knows its shape, its share of it and the checkpoint names of its parts. Its `quant_method` does the rest:
creates the weights, packs them, multiplies.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.errors import ConfigError, ShardingError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.layers.lora import LoRAMixin
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.parameters import add_weight, load_into, set_weight_attrs
from pymllm.weights.spec import FLOATS, OUT, LinearShape, Span, WeightSpec, refuse_sizes, side_by_side

__all__ = [
    "ColumnParallelLinear",
    "Linear",
    "LinearBase",
    "LoRAMixin",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "UnquantizedLinearMethod",
    "set_weight_attrs",
]


class RevisedModule(nn.Module):
    """A module that says when any of its kind has changed: what was recorded of a model (engine/tape.py) is then stale.

    revision: how often an attribute (a packed weight, a method, an adapter) of any of them was set.
    """

    revision: ClassVar[int] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        RevisedModule.revision += 1
        super().__setattr__(name, value)


class WeightedLayer(LoRAMixin, RevisedModule):
    """What linear layers, embeddings and heads share: a shape, a share of it, a `quant_method`, and adapters.

    kind: "linear", "embedding" or "lm_head", for formats and plans.  operation: which kernels run it.
    kept: its parameters that stay as they are, while the method's are packed.
    prefix: the layer's full dotted name; parts: the checkpoint names of what it fuses.
    """

    kind: ClassVar[str] = "linear"
    operation: ClassVar[str] = "linear"
    kept: ClassVar[tuple[str, ...]] = ("bias",)
    shape: LinearShape
    bias: nn.Parameter | None

    def __init__(self, prefix: str, params_dtype: torch.dtype | None) -> None:
        super().__init__()
        self._setup_lora()
        parallel = current_parallel()
        self.parallel, self.tp_rank, self.tp_size = parallel, parallel.rank, parallel.size
        self.execution = current_execution()
        self.prefix = prefix
        self.params_dtype = params_dtype or (
            self.execution.dtype if self.execution else torch.get_default_dtype()
        )

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        """The share of inputs, and of each part's outputs, of a rank.  ShardingError if there is none."""
        raise NotImplementedError

    def shape_for(self, rank: int, size: int, parts: Sequence[str]) -> LinearShape:
        inputs, outputs = self.shard(rank, size)
        if len(parts) < len(outputs):  # one rank has the tensor as it is, wherever its blocks begin
            total = sum(span.total for span in outputs)
            outputs = (Span.full(total),) if size == 1 else side_by_side(outputs)
        return LinearShape(inputs, outputs, tuple(parts), self.params_dtype)

    def _setup(
        self,
        parts: Sequence[str],
        quant_method: LinearMethodBase | None,
        quant_config: QuantizationConfig | None,
        bias: bool,
    ) -> None:
        """Choose the method and create the weights; `shard` must work by now."""
        self.shape = self.shape_for(self.tp_rank, self.tp_size, parts)
        if quant_method is None and quant_config is not None:
            methods = [
                quant_config.get_quant_method(self, part) or UnquantizedLinearMethod() for part in parts
            ]
            alike = len(methods) == 1 or (len(set(methods)) == 1 and methods[0].fuses)
            quant_method = methods[0] if alike else SplitLinearMethod(tuple(methods))
        self.quant_method: LinearMethodBase = quant_method or UnquantizedLinearMethod()
        shape = self.shape
        self.quant_method.create_weights(
            self,
            shape.in_features_local,
            [span.size for span in shape.outputs],
            shape.in_features,
            shape.out_features,
            self.params_dtype,
        )
        if bias:
            add_weight(self, WeightSpec("bias", self.params_dtype, (OUT,), accepts=FLOATS), shape)
        else:
            self.register_parameter("bias", None)

    @property
    def kept_dtype(self) -> torch.dtype | None:
        """The dtype that plain weights keep, the same for all parts (`Execution.kept_floats`); None: the layer's."""
        kept = self.execution.kept_floats if self.execution else {}
        first, *others = (kept.get(f"{part}.weight") for part in self.shape.parts)
        return first if all(other is first for other in others) else None

    def weight_loader(self, param: Tensor, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        """Cut a full checkpoint tensor for this rank and write it to `param`.

        shard_id: which part it is (index or name); None: the only one, or all parts side by side.
        CheckpointError names layer, tensor, expected and found if it does not fit, or was loaded already.
        """
        load_into(param, loaded_weight, self.part_index(shard_id), self.prefix)

    def part_index(self, shard_id: int | str | None) -> int | None:
        """The index of a part from its index or (last name segment)."""
        names = [part.rpartition(".")[2] for part in self.shape.parts]
        if shard_id is None or (isinstance(shard_id, int) and 0 <= shard_id < len(names)):
            return shard_id
        if shard_id in names:
            return names.index(str(shard_id))
        raise ConfigError(
            f"{self.prefix or type(self).__name__} has no part {shard_id!r}",
            code="shard-id",
            expected=" or ".join(names),
            found=str(shard_id),
        )


class LinearBase(WeightedLayer):
    """Common base of linear layers; `forward` is for subclasses."""

    def __init__(
        self,
        in_features: int,
        output_sizes: Sequence[int],
        bias: bool,
        quant_method: LinearMethodBase | None,
        *,
        prefix: str = "",
        part_names: Sequence[str] | None = None,
        quant_config: QuantizationConfig | None = None,
        params_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(prefix, params_dtype)
        what = prefix or type(self).__name__
        refuse_sizes(what, in_features=[in_features], out_features=output_sizes)
        self.in_features, self.output_sizes = in_features, tuple(output_sizes)
        self.out_features = sum(output_sizes)
        parent = prefix.rpartition(".")[0]
        parts = (
            [prefix]
            if part_names is None
            else [f"{parent}.{name}" if parent else name for name in part_names]
        )
        self._setup(parts, quant_method, quant_config, bias)

    @property
    def input_codes(self) -> RowCodes | None:
        """How `forward` takes x as `QuantisedRows`; None: only floats, as it is more than a kernel that reads them."""
        bound = bound_weight(self)
        if bound is None or bound.input_order is not None or self.adapters:
            return None
        if self._forward_pre_hooks or self._forward_hooks:
            return None
        if (
            type(self.quant_method).apply is not LinearMethodBase.apply
        ):  # a method that does more than the kernel
            return None
        ask = getattr(bound.selection.kernel, "input_codes", None)
        return None if ask is None else ask(bound.problem)

    def forward(self, x: Tensor) -> Tensor:
        """x: [*, I] (or this rank's share of I), or quantised as `input_codes` says.

        Returns [*, O] (or this rank's share of O).
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        shape = self.shape
        return (
            f"in_features={shape.in_features_local}/{shape.in_features}, "
            f"out_features={shape.out_features_local}/{shape.out_features}, method={self.quant_method.describe()}"
        )


class Linear(LinearBase):
    """A linear layer that every rank holds whole."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_method: LinearMethodBase | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, [out_features], bias, quant_method, **options)

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        return Span.full(self.in_features), (Span.full(self.out_features),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.quant_method.apply(self, x, self.bias)
        return self.add_lora(x, y) if self.adapters else y


ReplicatedLinear = Linear


class ColumnParallelLinear(LinearBase):
    """Output features are divided over ranks.  gather_output: every rank gets them all again."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        gather_output: bool = True,
        quant_method: LinearMethodBase | None = None,
        *,
        output_sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        self.gather_output = gather_output
        super().__init__(
            in_features,
            [out_features] if output_sizes is None else output_sizes,
            bias,
            quant_method,
            **options,
        )
        self.out_features_per_partition = self.shape.out_features_local
        self.output_start_index = self.shape.outputs[0].start
        self.output_end_index = self.shape.outputs[0].stop

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        what = self.prefix or type(self).__name__
        outputs = tuple(
            Span.even(total, rank, size, f"{what}, output features") for total in self.output_sizes
        )
        return Span.full(self.in_features), outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.quant_method.apply(self, x, self.bias)
        if self.adapters:
            self.add_lora(x, y)
        if not self.gather_output or self.tp_size == 1:
            return y
        parts = y.split([span.size for span in self.shape.outputs], dim=-1)
        return torch.cat([self.parallel.all_gather(part) for part in parts], dim=-1)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several named column-parallel parts (gate_proj and up_proj, say) in one matmul.  Every part must shard."""

    def __init__(
        self,
        in_features: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = True,
        quant_method: LinearMethodBase | None = None,
        *,
        part_names: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            in_features,
            sum(output_sizes),
            bias,
            gather_output,
            quant_method,
            output_sizes=output_sizes,
            part_names=part_names or [str(i) for i in range(len(output_sizes))],
            **options,
        )


class QKVParallelLinear(ColumnParallelLinear):
    """q, k and v projections in one matmul, divided by heads.

    With more ranks than key heads, every key head is held by several ranks.
    num_heads_local, num_kv_heads_local: this rank's heads.  kv_heads: its key heads, of all of them.
    local_sizes: its outputs of q, k and v.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        quant_method: LinearMethodBase | None = None,
        *,
        part_names: Sequence[str] = ("q", "k", "v"),
        **options: Any,
    ) -> None:
        self.head_size, self.total_num_heads = head_size, total_num_heads
        self.total_num_kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        kv_size = self.total_num_kv_heads * head_size
        super().__init__(
            hidden_size,
            total_num_heads * head_size + 2 * kv_size,
            bias,
            False,
            quant_method,
            output_sizes=[total_num_heads * head_size, kv_size, kv_size],
            part_names=part_names,
            **options,
        )
        _, (q, k, v) = self.shard(self.tp_rank, self.tp_size)
        self.local_sizes = [q.size, k.size, v.size]
        self.num_heads_local, self.num_kv_heads_local = q.size // head_size, k.size // head_size
        self.kv_heads = Span(k.start // head_size, k.stop // head_size, self.total_num_kv_heads)

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        what = self.prefix or type(self).__name__
        queries = Span.even(self.total_num_heads, rank, size, f"{what}, query heads")
        kv_heads = self.total_num_kv_heads
        if size <= kv_heads:
            keys = Span.even(kv_heads, rank, size, f"{what}, key heads")
        elif size % kv_heads == 0:
            head = rank * kv_heads // size
            keys = Span(head, head + 1, kv_heads)
        else:
            raise ShardingError(
                f"{what}: {kv_heads} key heads cannot be shared evenly by {size} tensor-parallel ranks",
                code="tp-size",
                expected="a size that divides the key heads or is a multiple of them",
                found=str(size),
            )
        heads = (queries, keys, keys)
        spans = tuple(
            Span(h.start * self.head_size, h.stop * self.head_size, h.total * self.head_size) for h in heads
        )
        return Span.full(self.in_features), spans

    def part_index(self, shard_id: int | str | None) -> int | None:
        return "qkv".index(shard_id) if shard_id in ("q", "k", "v") else super().part_index(shard_id)


class RowParallelLinear(LinearBase):
    """Input features are divided over ranks: x is this rank's share, and the ranks' products are summed.

    The bias is added on every rank after the sum, never before it.  reduce_output False leaves the sum to the caller:
    then rank 0 alone adds the bias, so that the sum has it once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        reduce_output: bool = True,
        quant_method: LinearMethodBase | None = None,
        **options: Any,
    ) -> None:
        self.reduce_output = reduce_output
        super().__init__(in_features, [out_features], bias, quant_method, **options)
        self.in_features_per_partition = self.shape.in_features_local
        self.input_start_index, self.input_end_index = self.shape.inputs.start, self.shape.inputs.stop

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        what = self.prefix or type(self).__name__
        inputs = Span.even(self.in_features, rank, size, f"{what}, input features")
        return inputs, (Span.full(self.out_features),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.quant_method.apply(self, x, None)
        if self.adapters:
            self.add_lora(x, y)  # this rank's share of it: reduced with the base, once
        if self.reduce_output:
            y = self.parallel.all_reduce(y)
        elif self.tp_rank > 0:
            return y
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class SplitLinearMethod(LinearMethodBase):
    """A fused layer whose parts have different methods: separate weights, outputs side by side.

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
        assert isinstance(layer, WeightedLayer)
        for index, method in enumerate(self.methods):
            holder = PartHolder(layer, index)
            layer.add_module(f"part_{index}", holder)
            holder.quant_method = method
            size = output_partition_sizes[index]
            method.create_weights(
                holder, input_size_per_partition, [size], input_size, size, params_dtype, **extra_weight_attrs
            )

    def holders(self, layer: nn.Module) -> list[PartHolder]:
        return [getattr(layer, f"part_{index}") for index in range(len(self.methods))]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for method, holder in zip(self.methods, self.holders(layer), strict=True):
            method.process_weights_after_loading(holder)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        outputs = [
            m.apply(holder, x, None) for m, holder in zip(self.methods, self.holders(layer), strict=True)
        ]
        y = torch.cat(outputs, dim=-1)
        return y if bias is None else y + bias

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        raise TypeError("each part of a split layer has its own specs")

    def to_canonical(self, tensors: Any, shape: LinearShape) -> CanonicalWeight:
        raise TypeError("each part of a split layer has its own canonical weight")

    def describe(self) -> str:
        return " | ".join(method.describe() for method in self.methods)


class PartHolder(RevisedModule):
    """The weights of one part of a split layer."""

    operation = "linear"
    kind = "linear"
    quant_method: LinearMethodBase

    def __init__(self, layer: WeightedLayer, index: int) -> None:
        super().__init__()
        self.shape = layer.shape.part(index)
        self.execution, self.params_dtype = layer.execution, layer.params_dtype
        self.prefix = self.shape.parts[0]

    def weight_loader(self, param: Tensor, loaded_weight: Tensor, shard_id: int | str | None = None) -> None:
        """As `WeightedLayer.weight_loader`, for the one part that this is."""
        load_into(param, loaded_weight, None, self.prefix)


def weighted_layers(model: nn.Module) -> Iterator[WeightedLayer]:
    """The layers that hold a quant_method, in the model's order."""
    for module in model.modules():
        if isinstance(module, WeightedLayer):
            yield module


def layer_parts(layer: WeightedLayer) -> list[tuple[LinearMethodBase, LinearShape, nn.Module]]:
    """The layer's packed weights: one, or one for each part where their methods differ."""
    if isinstance(layer.quant_method, SplitLinearMethod):
        holders = layer.quant_method.holders(layer)
        return [(holder.quant_method, holder.shape, holder) for holder in holders]
    return [(layer.quant_method, layer.shape, layer)]
