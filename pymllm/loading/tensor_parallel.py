"""The tensor-parallel sizes that a model can be divided over, and what stands in the way of the others."""

from __future__ import annotations

from collections.abc import Iterable

from pymllm.errors import ShardingError, counted
from pymllm.layers.held import WeightHolder, weight_holders
from pymllm.models.language_model import LanguageModel
from pymllm.weights.loader import place


def legal_tp_sizes(model: LanguageModel) -> list[int]:
    """Return the sizes that every layer of the model can be divided over, whatever its own is."""
    heads, refused = model.config.size("num_attention_heads"), refused_tp_sizes(model)
    return [size for size in range(1, heads + 1) if heads % size == 0 and size not in refused]


def refused_tp_sizes(model: LanguageModel) -> dict[int, str]:
    """Say why the model cannot be divided over other sizes: those that divide the heads, and the powers of two."""
    heads = model.config.size("num_attention_heads")
    # Names apart, a deep model repeats a few layers.
    distinct = {holder.likeness(): holder for _, holder in weight_holders(model)}
    reasons = {
        size: f"{counted(heads, 'attention head')} cannot be divided over {size} ranks"
        for size in (2**power for power in range(1, heads.bit_length()))
        if heads % size
    }
    for size in range(2, heads + 1):
        reason = _why_not_divided(distinct.values(), size) if heads % size == 0 else None
        if reason is not None:
            reasons[size] = reason
    return dict(sorted(reasons.items()))


def _why_not_divided(holders: Iterable[WeightHolder], size: int) -> str | None:
    """Return what first stands in the way of this size, or None."""
    try:
        for holder in holders:
            for rank in range(size):
                for method, share in holder.shares(rank, size):
                    method.check(share)
                    for spec in method.weight_specs(share):
                        place(spec, share)
    except ShardingError as error:
        return error.message.lstrip(": ")
    return None
