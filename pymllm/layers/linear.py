"""Linear layers: sharded over tensor-parallel ranks, with weights in any format."""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ShardingError
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.layers.lora import LoRAMixin
from pymllm.layers.weighted import WeightedLayer
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.parameters import set_weight_attrs
from pymllm.weights.spec import Span, refuse_sizes

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


class LinearBase(WeightedLayer):
    """The common base of linear layers; subclasses define `forward`."""

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
        """The codes in which `forward` may get x, as `QuantisedRows`; None: floats only.

        So it is where something beside the kernel reads x (an adapter, a hook, a method's own `apply`, a reordering of
        inputs), and where the kernel takes no codes.
        """
        bound = bound_weight(self)
        if bound is None or bound.input_order is not None or self.adapters:
            return None
        if self._forward_pre_hooks or self._forward_hooks:
            return None
        if type(self.quant_method).apply is not LinearMethodBase.apply:
            return None
        ask = getattr(bound.selection.kernel, "input_codes", None)
        return None if ask is None else ask(bound.problem)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x by the weight.

        x: [*, I] (or this rank's share of I), or quantised in `input_codes`.
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
    """A linear layer whose output features are divided over ranks.  gather_output: whether every rank gets all."""

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
    """A linear layer whose input features are divided over ranks: x is a rank's share, and the products are summed.

    Every rank adds the bias after the sum, never before it.  reduce_output: False leaves the sum to the caller; then
    rank 0 alone adds the bias, so that the sum has it once.
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
            # A rank's share of the adapter's product, which is summed together with the layer's own.
            self.add_lora(x, y)
        if self.reduce_output:
            y = self.parallel.all_reduce(y)
        elif self.tp_rank > 0:
            return y
        return y if self.bias is None else y + self.bias
