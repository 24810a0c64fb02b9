"""Integer codes of floats: by rounding to nearest, with searched scales, or with refined zero points."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pymllm.kernels.canonical import IntWeight

# How far `scale=mse` stretches or shrinks the range of a group. Past 1 for symmetric codes, whose top one lies half a
# step below the largest weight; below 0.6 no group of a real layer gained anything.
SHRINKS = (1.07, *(1 - 0.02 * step for step in range(1, 21)))


# HQQ's own settings: the norm 0.7, and 20 steps whose weight starts at 10 and grows by 1 % each.
HQQ_NORM, HQQ_STEPS, HQQ_WEIGHT, HQQ_GROWTH = 0.7, 20, 10.0, 1.01


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> IntWeight:
    """Round [O, I] float32 to nearest: a group's range is its largest magnitude, or its minimum to its maximum."""
    return IntWeight.from_float(weight, bits=bits, group_size=group_size, symmetric=symmetric)


def search_scales(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> IntWeight:
    """Round [O, I] float32 with the best of several ranges for each group: the one with the least squared error."""
    groups = weight.unflatten(1, (-1, group_size))  # [O, I/G, G]
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    best = round_to_nearest(weight, bits, group_size, symmetric)
    least = _squared_error(best, groups)  # [O, I/G]
    for shrink in SHRINKS:
        # A range shrinks when its values are clamped, and grows when they are multiplied.
        stretched = groups * shrink if shrink > 1 else groups.clamp(low * shrink, high * shrink)
        chosen = round_to_nearest(stretched.flatten(1), bits, group_size, symmetric)
        found = _recode(chosen, groups)
        error = _squared_error(found, groups)
        better = error < least
        least = torch.where(better, error, least)
        best = replace(
            best,
            codes=torch.where(
                better[..., None], found.codes.view_as(groups), best.codes.view_as(groups)
            ).flatten(1),
            scales=torch.where(better, found.scales, best.scales),
            zeros=None
            if found.zeros is None or best.zeros is None
            else torch.where(better, found.zeros, best.zeros),
        )
    return best


def refine_zeros(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> IntWeight:
    """Round [O, I] float32 by HQQ: a range from minimum to maximum, and a float zero point that few outliers move.

    It alternates, in closed form, between the error of which the 0.7-norm is taken and the zero points that explain
    the rest: half-quadratic splitting, as https://mobiusml.github.io/hqq_blog/ derives it.
    """
    assert not symmetric, "symmetric codes have no zero points to refine"
    groups = weight.unflatten(1, (-1, group_size))  # [O, I/G, G]
    top = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    limits = torch.finfo(torch.float16)
    scales = ((high - low) / top).clamp(limits.smallest_normal, limits.max).half().float()
    zeros = -low / scales
    best_zeros, least = zeros, torch.full_like(zeros, torch.inf)
    penalty = HQQ_WEIGHT
    for _ in range(HQQ_STEPS):
        codes = (groups / scales + zeros).round().clamp(0, top)
        error = groups - (codes - zeros) * scales
        size = error.abs()
        mean = size.mean(-1, keepdim=True)
        best_zeros = torch.where(mean < least, zeros, best_zeros)
        least = torch.minimum(mean, least)
        shrunk = size - size.clamp(min=torch.finfo(torch.float32).tiny).pow(HQQ_NORM - 1) / penalty
        outliers = torch.sign(error) * shrunk.clamp(min=0)
        zeros = (codes - (groups - outliers) / scales).mean(-1, keepdim=True)
        penalty *= HQQ_GROWTH
    codes = (groups / scales + best_zeros).round().clamp(0, top).to(torch.uint8)
    offsets = (-best_zeros * scales).squeeze(-1)
    return IntWeight(codes.flatten(1), scales.squeeze(-1).half(), None, bits, group_size, offsets=offsets)


def _recode(chosen: IntWeight, groups: Tensor) -> IntWeight:
    """Encode `groups` [O, I/G, G] with the scales and zero points of `chosen`."""
    zero: Tensor | int = (
        2 ** (chosen.bits - 1) if chosen.zeros is None else chosen.zeros.float().unsqueeze(-1)
    )
    codes = (groups / chosen.scales.float().unsqueeze(-1)).round() + zero
    return replace(chosen, codes=codes.clamp(0, 2**chosen.bits - 1).to(torch.uint8).flatten(1))


def _squared_error(weight: IntWeight, groups: Tensor) -> Tensor:
    """Sum the squared error of each group: [O, I/G]."""
    return (weight.dequantize(torch.float32).view_as(groups) - groups).square_().sum(-1)
