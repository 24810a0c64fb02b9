"""Integer linear weights: what the formats share that have groups of inputs, in whatever order these lie."""

# I in_features, O out_features, G group_size, P parts of a fused layer

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import Activations, IntWeight
from pymllm.quantization.storage.packing import unpack_words
from pymllm.weights.spec import IN, OUT, PART, Dim, LinearShape, WeightSpec, check_granule, whole

SMALLEST_GROUP = 16  # of the native kernels


def group_dim(group_size: int, shape: LinearShape, *, indexed: bool) -> Dim:
    """Make the dimension of scales and zero points along the inputs.

    group_size: 0 or less: one group.  indexed: whether inputs name their groups, so that every rank needs all groups.
    """
    groups = IN.every(group_size)
    if not indexed:
        return groups
    check_granule(groups, shape.in_features, shape.name)
    return whole(groups.stored(shape.in_features))


def index_spec(
    name: str, group_size: int, *, in_order: bool, accepts: tuple[torch.dtype, ...] = ()
) -> WeightSpec:
    """Make the spec of the tensor that names every input's group, which must say what the config says of the order."""
    refuse = functools.partial(_refuse_unordered if in_order else _refuse_unknown, group_size=group_size)
    return WeightSpec(name, torch.int32, (PART, IN), accepts=accepts, refuse=refuse)


def grouped_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    shape: LinearShape,
    *,
    index: Tensor | None = None,
    activations: Activations = "float",
    input_scales: Tensor | None = None,
    input_zeros: Tensor | None = None,
) -> IntWeight:
    """Make the canonical weight of codes [O, I] with scales and zeros [O, I/G] as `group_dim` stores them.

    index: [P, I], the group of every input, where the format names it ("act order").  A whole layer's inputs are sorted
    by group, so that groups lie in order for any kernel; a rank's share of the inputs keeps the index.  The shape alone
    says which of the two it is, so that a plan knows it without data.
    Where the last group is short, smaller groups that divide all of them repeat their scales, in order for any kernel,
    too; where these would be smaller than kernels take, inputs keep an index.
    """
    groups, inputs, start = scales.shape[1], codes.shape[1], shape.inputs.start
    order = None
    even = math.gcd(group_size, start, inputs)  # divides the last group, too, where it is short
    runs = even == group_size or even >= SMALLEST_GROUP
    if groups <= 1:
        group_size, index, even = inputs, None, inputs
    elif index is not None:
        index = same_for_all_parts(index, shape)
        if inputs == shape.in_features and runs and _full_groups(index, group_size):
            order = torch.argsort(index, stable=True)
            codes, index = codes[:, order], None
    elif not runs:
        index = _groups_from(start, inputs, 1, group_size, codes.device)
    if index is None and even != group_size:
        taken = _groups_from(start, inputs, even, group_size, codes.device)
        scales = scales[:, taken]
        zeros = None if zeros is None else zeros[:, taken]
        group_size = even
    return IntWeight(
        codes,
        scales,
        zeros,
        bits,
        group_size,
        group_index=None if index is None else index.to(torch.int32),
        input_order=order,
        activations=activations,
        input_scales=input_scales,
        input_zeros=input_zeros,
    )


def unpack_outputs(words: Tensor, bits: int, shape: LinearShape) -> Tensor:
    """Unpack words that are packed along the outputs: [N, W] -> [O, N] fields.  Each part starts a word of its own."""
    dim = OUT.in_words(bits)
    counts = [span.stored(dim, shape.name).size for span in shape.outputs]
    parts = [
        unpack_words(part, bits)[:, : span.size]
        for part, span in zip(words.split(counts, dim=1), shape.outputs, strict=True)
    ]
    return torch.cat(parts, dim=1).t().contiguous()


def same_for_all_parts(index: Tensor, shape: LinearShape) -> Tensor:
    """Return the index of all parts: [P, I] -> [I].  ConfigError if they differ, as one weight has one order."""
    if index.shape[0] > 1 and not index.is_meta and not bool((index == index[0]).all()):
        raise ConfigError(
            "the parts of a fused layer order their inputs differently, so they cannot be one weight",
            code="act-order-fused",
            tensor=shape.name,
            fix="Build the layer from its quantisation config, which keeps such parts apart.",
        )
    return index[0]


def _groups_from(start: int, inputs: int, step: int, group_size: int, device: torch.device) -> Tensor:
    """Return the group of every `step`-th input from `start` on, counted from the first one's."""
    return torch.arange(start, start + inputs, step, device=device) // group_size - start // group_size


def _full_groups(index: Tensor, group_size: int) -> bool:
    """Tell whether all groups but the last are full, as all writers make them.  Without data, they are."""
    if index.is_meta:
        return True
    in_order = torch.arange(index.numel(), device=index.device) // group_size
    return torch.equal(torch.bincount(index), torch.bincount(in_order))


def _refuse_unordered(index: Tensor, shape: LinearShape, group_size: int) -> str | None:
    """Refuse an index that does not name groups in the order of inputs, unless it is all -1 (not set)."""
    inputs = torch.arange(shape.inputs.start, shape.inputs.stop, device=index.device)
    expected = inputs // group_size if group_size > 0 else torch.zeros_like(inputs)
    found = index.reshape(-1)
    if bool((found == expected).all()) or bool((found == -1).all()):
        return None
    return "groups that do not lie in order, although the config has no act order (desc_act, actorder)"


def _refuse_unknown(index: Tensor, shape: LinearShape, group_size: int) -> str | None:
    """Refuse an index that names groups which the layer does not have."""
    groups = IN.every(group_size).stored(shape.in_features)
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    return None if low >= 0 and high < groups else f"groups {low} to {high}, of a layer with {groups}"
