"""Our methods as vLLM's layers call theirs: parameters that vLLM's loader fills, packed once, run by our kernels."""

# O out_features, I in_features, V vocabulary

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from pymllm.config import Execution
from pymllm.errors import CheckpointError, ConfigError, counted
from pymllm.quantization.method import LinearMethodBase as OurMethod
from pymllm.weights.loader import copy_full_tensor, slots_of, written_of
from pymllm.weights.spec import LinearShape, Span, side_by_side

if TYPE_CHECKING:
    from pymllm.hosts.vllm import PymllmConfig

# The layers whose division over ranks is known here: their subclasses may divide in ways of their own.
DIVIDED = (
    QKVParallelLinear,
    MergedColumnParallelLinear,
    ColumnParallelLinear,
    RowParallelLinear,
    ReplicatedLinear,
    VocabParallelEmbedding,
)


class HeldWeights(nn.Module):
    """One weight of a layer of vLLM's: several parts of it in one method, or a single part.

    first: the index of its first part in the layer.
    """

    def __init__(self, shape: LinearShape, method: OurMethod, first: int, operation: str) -> None:
        super().__init__()
        self.shape, self.quant_method, self.first, self.operation = shape, method, first, operation
        self.prefix = shape.name
        self.execution: Execution | None = None

    def load(self, param: Tensor, loaded: Tensor, parts: range | None) -> None:
        """Write a full checkpoint tensor.  parts: those that it holds, counted in this weight; None: all."""
        slots = slots_of(param) or []
        count = len(slots)
        if parts is not None and not slots[0].together:
            if parts.start < 0 or parts.stop > count:
                raise ConfigError(
                    f"{self.prefix} has no such part",
                    code="shard-id",
                    expected=f"0 to {count - 1}",
                    found=str(list(parts)),
                )
            slots = slots[parts.start : parts.stop]
        copy_full_tensor(param.data, slots, loaded, written_of(param), None, self.prefix)


class HostedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The method of one layer of vLLM's, which holds ours.

    parts: the checkpoint names of what the layer fuses; one for several outputs: the files have them in one tensor.
    methods: ours, one for each of `parts`.  config: what made it, which is told what is read.
    """

    def __init__(self, parts: Sequence[str], methods: Sequence[OurMethod], config: PymllmConfig) -> None:
        super().__init__()
        self.parts, self.methods, self.config = tuple(parts), tuple(methods), config

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
        """Register a parameter for each stored tensor; each one's `weight_loader` cuts it for this rank."""
        shape = layer_share(layer, self.parts, input_size_per_partition, output_partition_sizes, params_dtype)
        operation = "embedding" if is_table(layer) else "linear"
        alike = len(set(self.methods)) == 1 and (len(self.methods) == 1 or self.methods[0].fuses)
        if alike:
            weights = [HeldWeights(shape, self.methods[0], 0, operation)]
        else:
            weights = [
                HeldWeights(shape.part(index), method, index, operation)
                for index, method in enumerate(self.methods)
            ]
        params: dict[str, dict[int, Tensor]] = {}  # of each weight, by the name that vLLM's loader looks for
        for index, weight in enumerate(weights):
            one = weight.shape
            local = one.in_features_local, [span.size for span in one.outputs]
            weight.quant_method.create_weights(weight, *local, one.in_features, one.out_features, one.dtype)
            for spec in weight.quant_method.weight_specs(one):
                names = (spec.name, *spec.aliases)
                known = (name for name in names if f"{one.parts[0]}.{name}" in self.config.ruled.stored)
                chosen = next(known, spec.name)
                self.config.used.update(f"{part}.{chosen}" for part in one.parts)
                if "." in chosen:  # no parameter is called so
                    self.config.renamed[f".{chosen}"] = f".{spec.name}"
                    chosen = spec.name
                params.setdefault(chosen, {})[index] = getattr(weight, spec.name)
        self.config.hosted.update(self.parts)
        for name, found in params.items():
            param: Any = next(iter(found.values()))
            layer.register_parameter(name, param)
            param.weight_loader = functools.partial(_load, weights, found)
        vars(layer)["held_weights"] = weights  # no child: its parameters are the layer's, under vLLM's names
        vars(layer)["held_names"] = list(params)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack what has been loaded, once.  CheckpointError for a parameter that was not written in full."""
        weights: list[HeldWeights] = vars(layer)["held_weights"]
        names = vars(layer).pop("held_names", None)
        if names is None:
            return
        for weight in weights:
            for param in weight.parameters():
                _check_written(weight, param)
            device = next(weight.parameters()).device
            dtype = weight.shape.dtype
            weight.execution = Execution(str(device), dtype, self.config.compute, self.config.kernels)
            weight.quant_method.process_weights_after_loading(weight)
        for name in names:
            delattr(layer, name)
        vars(layer)["held_handle"] = _register(weights)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply: x [*, I_local] -> [*, O_local]."""
        held = vars(layer)
        sizes = sum(weight.shape.out_features_local for weight in held["held_weights"])
        return torch.ops.pymllm_hosts.linear(x, bias, held["held_handle"], sizes)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Look up rows.  input_: ids within this rank's share."""
        (weight,) = vars(layer)["held_weights"]
        return weight.quant_method.embed(weight, input_)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Refuse a table that is quantised and is the head's, too."""
        raise refuse_tied(self.parts[0])


def refuse_tied(name: str) -> ConfigError:
    """Make the error for a quantised table that vLLM would share between embedding and head."""
    return ConfigError(
        "the embedding and the head share one table, which vLLM keeps as plain floats",
        code="not-hosted",
        tensor=name,
        fix="Run the checkpoint with pymllm, or leave both out of your rules.",
    )


def is_table(layer: nn.Module) -> bool:
    """Tell whether a layer looks rows up: an embedding, and no head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


def layer_share(
    layer: Any, parts: Sequence[str], in_local: int, out_local: Sequence[int], dtype: torch.dtype
) -> LinearShape:
    """Return the shape of a layer of vLLM's, and this rank's share of it.

    parts: the checkpoint names of what it fuses.  in_local, out_local: vLLM's own count of the share.
    ConfigError for a layer that divides its weight in a way of its own, or fuses another number of parts.
    """
    known = next((kind for kind in DIVIDED if isinstance(layer, kind)), None)
    if known is None or type(layer).weight_loader is not known.weight_loader:
        raise ConfigError(
            f"vLLM's {type(layer).__name__} loads its weight in a way of its own",
            code="not-hosted",
            tensor=layer.prefix,
            expected=" or ".join(kind.__name__ for kind in DIVIDED),
            fix="Run the checkpoint with pymllm, or leave the layer out of your rules.",
        )
    rank, inputs = layer.tp_rank, Span.full(layer.input_size)
    outputs: tuple[Span, ...]
    if known is RowParallelLinear:
        inputs = Span(rank * in_local, (rank + 1) * in_local, layer.input_size)
        outputs = tuple(map(Span.full, out_local))
    elif known is ReplicatedLinear:
        outputs = tuple(map(Span.full, out_local))
    elif known is VocabParallelEmbedding:
        share = layer.shard_indices
        if layer.num_added_embeddings:
            raise ConfigError(
                "the vocabulary has rows that the checkpoint lacks",
                code="not-hosted",
                tensor=layer.prefix,
                expected=str(layer.org_vocab_size),
                found=str(layer.num_embeddings),
            )
        start, stop = share.org_vocab_start_index, share.org_vocab_end_index
        outputs = (Span(start, stop, layer.org_vocab_size, out_local[0] - (stop - start)),)
    elif known is QKVParallelLinear:
        q, k, v = out_local
        head = rank // layer.num_kv_head_replicas
        keys, values = (layer.total_num_kv_heads * size for size in (layer.head_size, layer.v_head_size))
        queries = layer.total_num_heads * layer.head_size
        outputs = (
            Span(rank * q, (rank + 1) * q, queries),
            Span(head * k, (head + 1) * k, keys),
            Span(head * v, (head + 1) * v, values),
        )
    else:
        outputs = tuple(Span(rank * n, (rank + 1) * n, n * layer.tp_size) for n in out_local)
    if len(parts) == 1 < len(outputs):
        # One tensor holds them all; a single rank reads it as it is, even if a block of it lies across two.
        whole = (Span.full(sum(span.total for span in outputs)),)
        outputs = whole if layer.tp_size == 1 else side_by_side(outputs)
    elif len(parts) != len(outputs):
        raise ConfigError(
            f"vLLM's model fuses {counted(len(outputs), 'part')} in this layer",
            code="not-hosted",
            tensor=layer.prefix,
            expected=f"{len(outputs)} checkpoint names",
            found=", ".join(parts),
        )
    return LinearShape(inputs, outputs, tuple(parts), dtype)


def _load(
    weights: Sequence[HeldWeights],
    params: Mapping[int, Tensor],
    param: Tensor,
    loaded_weight: Tensor,
    shard_id: int | str | tuple[int, ...] | None = None,
) -> None:
    """Write a checkpoint tensor to the weight that has its part: the `weight_loader` of every parameter.

    params: the parameters of that name, by the index of their weight.  shard_id: as vLLM counts parts; None: all.
    """
    if isinstance(shard_id, str):
        shard_id = "qkv".index(shard_id)
    if shard_id is None and len(weights) > 1:
        raise ConfigError(
            "one tensor holds parts that have different methods",
            code="not-hosted",
            tensor=" + ".join(weight.prefix for weight in weights),
            fix="Give all of them one method.",
        )
    first, last = (shard_id[0], shard_id[-1]) if isinstance(shard_id, tuple) else (shard_id, shard_id)
    index = 0 if first is None or len(weights) == 1 else first
    weight = weights[index]
    if index not in params:
        raise CheckpointError(
            "the part has another method, which has no such tensor",
            code="unexpected",
            tensor=weight.prefix,
            expected=weight.quant_method.describe(),
        )
    parts = None if first is None else range(first - weight.first, last - weight.first + 1)  # type: ignore[operator]
    # With several weights, vLLM knows the parameter of the first that has the name.
    weight.load(param if len(params) == 1 else params[index], loaded_weight, parts)


def _check_written(weight: HeldWeights, param: Tensor) -> None:
    slots = slots_of(param) or []
    wanted, found = sum(slot.elements for slot in slots), written_of(param).elements
    if found != wanted:
        raise CheckpointError(
            "part of the parameter was not written",
            code="half-written",
            tensor=slots[0].tensor,
            expected=f"{counted(wanted, 'element')}",
            found=str(found),
        )


_handles = itertools.count()
_held: dict[int, list[HeldWeights]] = {}


def _register(weights: list[HeldWeights]) -> int:
    """Give a layer's packed weights a number, by which compiled code knows them."""
    handle = next(_handles)
    _held[handle] = weights
    return handle


@torch.library.custom_op("pymllm_hosts::linear", mutates_args=())
def _run(x: Tensor, bias: Tensor | None, handle: int, out_features: int) -> Tensor:
    """Multiply by the weights of a layer.  Compilers see one operation, and none of what a kernel does inside."""
    weights = _held[handle]
    if len(weights) == 1:
        return weights[0].quant_method.apply(weights[0], x, bias)
    y = torch.cat([weight.quant_method.apply(weight, x) for weight in weights], dim=-1)
    return y if bias is None else y + bias


@_run.register_fake
def _(x: Tensor, bias: Tensor | None, handle: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
