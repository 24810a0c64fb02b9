"""The state of a linear layer, an embedding or a head: a swap makes one in other methods, and then puts it in place."""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.layers.held import HeldWeight
from pymllm.layers.split import PartHolder, SplitLinearMethod
from pymllm.quantization.binding import BoundWeight, bind_for, bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape

if TYPE_CHECKING:
    from pymllm.layers.weighted import WeightedLayer

# Canonical tensors whose first dimension is O.
BY_OUTPUT = ("weight", "codes", "scales", "zeros", "offsets", "row_scales")


@dataclass(frozen=True, eq=False)
class LayerState:
    """All that a swap changes of a layer: its method, and its packed weight or the weights of its parts.

    holders: the modules of the parts, where each has a weight of its own; `bound` is then None.
    """

    layer: WeightedLayer
    method: Any  # LinearMethodBase, or SplitLinearMethod
    bound: BoundWeight | None
    holders: tuple[PartHolder, ...]
    shares_table: bool

    @classmethod
    def of(cls, layer: WeightedLayer) -> LayerState:
        """Note what the layer runs now."""
        method = layer.quant_method
        holders = tuple(method.holders(layer)) if isinstance(method, SplitLinearMethod) else ()
        return cls(layer, method, bound_weight(layer), holders, layer.shares_table)

    @property
    def rearranged(self) -> bool:
        """True where tensors may be read into other modules: those of parts, or a head's own copy of a tied table."""
        return bool(self.holders) or self.layer.tied_to is not None

    def same_as(self, other: Any) -> bool:
        """Tell whether these are the very same tensors in the same method."""
        mine, others = ((s.bound, *s.holders) for s in (self, other))
        same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))
        return same and (self.method, self.shares_table) == (other.method, other.shares_table)

    def packed(self) -> list[BoundWeight]:
        """Return the packed weights."""
        return [w for w in (self.bound, *map(bound_weight, self.holders)) if w is not None]

    def held(self) -> tuple[HeldWeight, ...]:
        """Return the weights as they are stored; none where another layer's table is shared."""
        operation = self.layer.operation
        if self.shares_table:
            return ()
        if self.holders:
            return tuple(HeldWeight(h.quant_method, h.shape, operation, h, h) for h in self.holders)
        return (HeldWeight(self.method, self.layer.shape, operation, self.layer, self.layer),)

    def install(self) -> None:
        """Put the method and the weights in place."""
        layer = self.layer
        for name in [name for name, child in layer.named_children() if isinstance(child, PartHolder)]:
            delattr(layer, name)
        for index, holder in enumerate(self.holders):
            layer.add_module(f"part_{index}", holder)
        layer.quant_method = self.method
        layer.bound = self.bound  # type: ignore[assignment]
        layer.shares_table = self.shares_table


def restage(layer: WeightedLayer, old: LayerState, methods: Sequence[LinearMethodBase]) -> LayerState:
    """Make the state of a layer with other methods, one for each part, from the weights of `old`, which run.

    The layer stays as it is.
    """
    if len(set(methods)) == 1 and not old.holders:
        return replace(old, method=methods[0], bound=repacked(layer, old, methods[0]))
    return _parts_apart(layer, old, methods)


def repacked(layer: WeightedLayer, old: LayerState, method: LinearMethodBase) -> BoundWeight:
    """Pack the layer's one weight in another method."""
    assert old.bound is not None
    if method == old.method:
        return old.bound
    method.check(layer.shape)
    return bind_for(layer, encode(old.bound.canonical(), old.method, method, layer.shape))


def _parts_apart(layer: WeightedLayer, old: LayerState, methods: Sequence[LinearMethodBase]) -> LayerState:
    """Make the state of parts whose methods differ, or that have weights of their own already.

    A part whose method does not change keeps its weight.
    """
    former = [h.quant_method for h in old.holders] if old.holders else [old.method] * len(methods)
    if former == list(methods):
        return old
    canonical = None if old.bound is None else old.bound.canonical()
    holders = []
    for index, (was, method) in enumerate(zip(former, methods, strict=True)):
        if old.holders and was == method:
            holders.append(old.holders[index])
            continue
        holder = PartHolder(layer, index, method)
        if old.holders:
            bound = bound_weight(old.holders[index])
            assert bound is not None
            weight = bound.canonical()
        else:
            assert canonical is not None
            weight = cut_part(canonical, layer.shape, index, was)
        method.check(holder.shape)
        holder.bound = bind_for(holder, encode(weight, was, method, holder.shape))  # type: ignore[assignment]
        holders.append(holder)
    return replace(old, method=SplitLinearMethod(tuple(methods)), bound=None, holders=tuple(holders))


def encode(
    weight: CanonicalWeight, was: LinearMethodBase, method: LinearMethodBase, shape: LinearShape
) -> CanonicalWeight:
    """Convert a running weight of method `was` to `method`, by each conversion that `method` names since `was`."""
    if method == was:
        return weight
    assert isinstance(method, ConvertedLinearMethod)
    return method.convert(encode(weight, was, method.source, shape), shape)


def cut_part(
    weight: CanonicalWeight, shape: LinearShape, index: int, method: LinearMethodBase
) -> CanonicalWeight:
    """Cut the rows of one part out of a fused weight, bit for bit, into tensors of their own."""
    sizes = [span.size for span in shape.outputs]
    start = sum(sizes[:index])
    rows = slice(start, start + sizes[index])
    if isinstance(weight, Fp8Weight):
        weight = _scales_by_row(weight)
    cut: dict[str, Tensor] = {}
    for entry in fields(weight):
        value = getattr(weight, entry.name)
        if not isinstance(value, Tensor):
            continue
        if entry.name in BY_OUTPUT and value.shape[0] == sum(sizes):
            value = value[rows]
        elif entry.name == "input_scales" and value.numel() == len(sizes):
            value = value[index : index + 1]
        cut[entry.name] = value.clone()
    part = replace(weight, **cut)  # type: ignore[arg-type]
    if isinstance(part, Fp8Weight):
        kind = method.planned(shape.part(index)).type
        assert isinstance(kind, Fp8Type)
        part = replace(part, part_sizes=(sizes[index],))
        part = _scales_by_block(part, kind.block[0])
    return part


def _scales_by_row(weight: Fp8Weight) -> Fp8Weight:
    """Return the same weight with a row of scales for every row, which can be cut anywhere."""
    side, rows = weight.block[0] or weight.shape[0], weight.shape[0]
    scales = weight.scales.repeat_interleave(side, dim=0)[:rows]
    return replace(weight, scales=scales, block=(1, weight.block[1]))


def _scales_by_block(weight: Fp8Weight, side: int) -> Fp8Weight:
    """Return the weight with a row of scales for every `side` rows (0: all rows) again, where that says the same."""
    rows = weight.shape[0]
    coarse = weight.scales[:: side or rows].contiguous()
    if rows == 0 or not torch.equal(coarse.repeat_interleave(side or rows, dim=0)[:rows], weight.scales):
        return weight
    return replace(weight, scales=coarse, block=(side, weight.block[1]))
