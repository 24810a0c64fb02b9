"""The division of a class's model over ranks, by the class's own plan of tensor parallelism.

transformers says by module name which linear layers have their outputs divided ("colwise") and which their inputs
("rowwise"). Our layers are divided likewise, attention by whole heads, and a run on the meta device with a rank's own
shapes shows that every module computes with them. What the plan leaves out, every rank has whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ShardingError
from pymllm.layers.held import WeightHolder
from pymllm.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from pymllm.models.generic.alike import StandIn
from pymllm.models.generic.classes import GenericConfig
from pymllm.models.generic.layers import ReadableWeight
from pymllm.models.generic.probe import AttentionCall, Probe, probe
from pymllm.models.generic.recurrences import Recurrences
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape, Span

WHOLE = ("replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "colwise_gather_output")
COLUMNS, ROWS = ("colwise", "packed_colwise"), ("rowwise", "rowwise_split_input")
# What these say of is divided by our own layers, or whole on every rank, with the same results.
OURS = ("embedding_rowwise", "embedding_colwise", "moe_tp_experts", "moe_identity_expert", "all_reduce")
LOCAL = "local_params"  # the module computes with its own share of plain parameters


class DividedOutputs(ReadableWeight, ColumnParallelLinear):
    """A linear layer whose outputs are divided over ranks, by whole heads where it makes heads.

    heads: how many heads its outputs are; 0: they are no heads.  With more ranks than `replicated` key heads, each is
    held by several ranks.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        *,
        heads: int = 0,
        replicated: bool = False,
        **options: Any,
    ) -> None:
        self.heads, self.replicated = heads, replicated
        super().__init__(inputs, outputs, bias, gather_output=False, **options)

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        if not self.heads:
            return super().shard(rank, size)
        each, what = self.out_features // self.heads, f"{self.prefix}, heads"
        if self.replicated and size > self.heads and size % self.heads == 0:
            share = Span(rank * self.heads // size, rank * self.heads // size + 1, self.heads)
        else:
            share = Span.even(self.heads, rank, size, what)
        return Span.full(self.in_features), (Span(share.start * each, share.stop * each, self.out_features),)

    def likeness(self) -> Any:
        return super().likeness(), self.heads, self.replicated


class DividedInputs(ReadableWeight, RowParallelLinear):
    """A linear layer whose inputs are divided over ranks.  splits: x comes whole, and a rank takes its share of it."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, *, splits: bool = False, **options: Any
    ) -> None:
        self.splits = splits
        super().__init__(inputs, outputs, bias, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.splits and self.tp_size > 1:
            x = x[..., self.input_start_index : self.input_end_index].contiguous()
        return super().forward(x)


class Division(WeightHolder):
    """The styles of a model's modules, and why other ranks than one cannot have shares of it.

    styles: by the name of a module.  why_not: None: they can.  try_out: finds out, when it is first asked; None: it is
    known.  size: the number of ranks of this model.  calls: of attention, by the name of a module, whole.
    """

    loads: ClassVar[bool] = False  # type: ignore[assignment]
    try_out: Callable[[], str | None] | None = None

    def __init__(self, model: Any, found: Probe) -> None:
        super().__init__()
        plan: Mapping[str, str] = model.tp_plan or {}
        self.calls, self.size = dict(found.attention), current_parallel().size
        self.styles = {n: plan[_pattern(n)] for n, _ in model.named_modules() if _pattern(n) in plan}
        self.why_not = None if found.why_not is None else f"its requests run alone: {found.why_not}"
        inner = [style for name, style in self.styles.items() if name.startswith(f"{found.base}.")]
        if self.why_not is None and not inner:
            self.why_not = f"{type(model).__name__} has no plan of tensor parallelism"
        for name, style in self.styles.items():
            if self.why_not is None and style not in (*WHOLE, *COLUMNS, *ROWS, *OURS, LOCAL):
                self.why_not = f"{name} is to be divided in a way that is not known here, {style}"

    def shares(self, rank: int, size: int) -> Iterable[tuple[LinearMethodBase, LinearShape]]:
        """Give nothing: the layers give theirs.  ShardingError where there can be no shares."""
        if size > 1 and self.why_not is None and self.try_out is not None:
            self.why_not, self.try_out = self.try_out(), None
        if size > 1 and self.why_not is not None:
            raise ShardingError(
                f"the model is not divided over ranks: {self.why_not}",
                code="tp-size",
                expected="1 rank",
                found=str(size),
            )
        if size > 1:
            for call in {*chain.from_iterable(self.calls.values())}:
                Span.even(call.num_heads, rank, size, "query heads")
                if size < call.num_kv_heads or size % call.num_kv_heads:
                    Span.even(call.num_kv_heads, rank, size, "key heads")
        return ()

    def own_calls(self, model: Any, config: GenericConfig) -> dict[str, list[AttentionCall]]:
        """Return this rank's calls of attention, by the name of a module, once they have been made on the meta device.

        A single rank tries the smallest number of ranks that can be, so that a plan knows.
        """
        parallel = current_parallel()
        self.shares(parallel.rank, parallel.size)
        heads = config.size("num_attention_heads")
        size = self._smallest(model, heads) if parallel.size == 1 else parallel.size
        if self.why_not is not None or size is None:
            return self.calls
        calls = self._check(model, parallel.rank, size, config.size("max_position_embeddings"))
        self.shares(parallel.rank, parallel.size)
        return self.calls if parallel.size == 1 else calls

    def make_linear(
        self, module: Any, name: str, quant_config: QuantizationConfig | None
    ) -> LinearBase | None:
        """Make the divided layer of a linear layer.  None: every rank has it whole."""
        if not isinstance(module, nn.Linear):
            return None
        style = self.styles.get(name)
        if self.why_not is not None or style not in (*COLUMNS, *ROWS) or type(module).__name__ == "Conv1D":
            return None
        sizes = (module.in_features, module.out_features, module.bias is not None)
        options: dict[str, Any] = {"prefix": name, "quant_config": quant_config}
        if style in ROWS:
            return DividedInputs(*sizes, splits=style == "rowwise_split_input", **options)
        if style == "packed_colwise":
            half = module.out_features // 2
            return DividedOutputs(*sizes, output_sizes=(half, half), **options)
        heads, replicated = self._heads(name, module.out_features)
        return DividedOutputs(*sizes, heads=heads, replicated=replicated, **options)

    def _heads(self, name: str, outputs: int) -> tuple[int, bool]:
        """Return how many heads a layer makes (0: it makes none), and whether they are key heads that may repeat."""
        module = next((module for module in self.calls if name.startswith(f"{module}.")), None)
        if module is None:
            return 0, False
        call = self.calls[module][0]
        keys = (call.num_kv_heads * call.head_dim, call.num_kv_heads * call.value_head_dim)
        if call.num_kv_heads < call.num_heads and outputs in keys:
            return call.num_kv_heads, True
        return (call.num_heads, False) if outputs % call.num_heads == 0 else (0, False)

    def _check(self, model: Any, rank: int, size: int, longest: int) -> dict[str, list[AttentionCall]]:
        """Run the model on the meta device with a rank's shapes.  Returns the rank's own calls of attention.

        A module that cannot be run so becomes `why_not`.
        """
        with _shapes_of(model, rank, size):
            found = probe(model, longest)
        reason = found.why_not
        for name, calls in self.calls.items():
            local = found.attention.get(name, [])
            if reason is None and (len(local) != len(calls) or not all(map(_shared, calls, local))):
                reason = f"the attention of {name} has other heads than a share of its own"
        if reason is not None:
            self.why_not = f"with a share of its heads, {reason}"
        return found.attention

    def _smallest(self, model: nn.Module, heads: int) -> int | None:
        """Return the smallest number of ranks above 1 over which all layers can be divided.  heads: of queries."""
        layers = [module for module in _layers(model) if module.kind != "embedding"]
        for size in (size for size in range(2, heads + 1) if heads % size == 0):
            try:
                for layer in {layer.likeness(): layer for layer in layers}.values():
                    layer.shard(0, size)
            except ShardingError:
                continue
            return size
        return None


def _pattern(name: str) -> str:
    """Return a module's name as plans have it, with * for each index."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _shared(whole: AttentionCall, local: AttentionCall) -> bool:
    """Tell whether a rank's call is a share of the whole one: some of its heads, and all else alike."""
    fits = local.num_heads % local.num_kv_heads == 0 and whole.num_heads % local.num_heads == 0
    return fits and replace(local, num_heads=whole.num_heads, num_kv_heads=whole.num_kv_heads) == whole


def _layers(model: nn.Module) -> list[ReadableWeight]:
    """List our linear layers and embeddings, without the head."""
    return [m for m in model.modules() if isinstance(m, ReadableWeight) and m.kind != "lm_head"]


@contextmanager
def _shapes_of(model: nn.Module, rank: int, size: int) -> Iterator[None]:
    """Have our layers make tensors of a rank's shapes without any data, for the time of a `with` block."""
    layers = _layers(model)
    lengths = [(module, len(module)) for module in model.modules() if isinstance(module, Recurrences)]
    for layer in layers:
        layer.__dict__["forward"] = _stand_in(layer, rank, size)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
        for module, length in lengths:  # a run adds the recurrences of its calls
            del module[length:]


def _stand_in(layer: Any, rank: int, size: int) -> Any:
    shape = layer.shape_for(rank, size, layer.shape.parts)
    splits = getattr(layer, "splits", False)
    wanted = shape.in_features if splits else shape.in_features_local

    def look_up(ids: Tensor) -> Tensor:
        return torch.empty((*ids.shape, layer.embedding_dim), dtype=layer.params_dtype, device="meta")

    def multiply(x: Tensor) -> Tensor:
        if x.shape[-1] != wanted:
            raise ValueError(f"{layer.prefix} gets {x.shape[-1]} of its {wanted} features")
        return x.new_empty((*x.shape[:-1], shape.out_features_local))

    table = layer.kind == "embedding"
    return StandIn((table, wanted, shape.out_features_local), look_up if table else multiply)
