"""Floats to the codes of GGUF's block types: what each type's writer does, or a search for the least squared error.

The types of 32 values (Q4_0 to Q8_0) are rounded exactly as llama.cpp rounds them, value by value. The K types, of 256
values, are searched: each group has the scale (and minimum) that explain its values best for one of several ranges,
by least squares; then the group scales are rounded to small integers, and the codes chosen for what these mean.
"""

# N rows, K blocks of a row, S groups of a block, G values of a group

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.kernels.canonical import IntWeight
from pymllm.quantization.storage.gguf_blocks import BLOCKS

ROWS_BYTES = 4 << 20  # of floats that are rounded at a time, so that the search's temporaries stay small
# How far the ranges of a search go beyond the codes' own, in codes: at each step groups are divided into so many.
STRETCHES = tuple(0.1 * step for step in range(-10, 11))
K_VALUES = 256

# Rounds [N, I] floats.  Returns codes [N, I] uint8, scales [N, I/G], and offsets alike or None.
Rounded = tuple[Tensor, Tensor, Tensor | None]


def round_to_blocks(weight: Tensor, kind: str) -> IntWeight:
    """Round a weight [O, I] to a block type; the scales are those that the type can store.  kind: a key of ROUNDING.

    The type's blocks must divide I.
    """
    rounded, bits, group = ROUNDING[kind], BLOCKS[kind].bits, BLOCKS[kind].group
    if weight.is_meta:  # a plan needs the shapes alone
        scales = weight.new_empty((weight.shape[0], weight.shape[1] // group), dtype=BLOCKS[kind].scales)
        offsets = torch.empty_like(scales) if BLOCKS[kind].offsets else None
        return IntWeight(weight.to(torch.uint8), scales, None, bits, group, offsets=offsets)
    step = max(1, ROWS_BYTES // max(4 * weight.shape[1], 1))
    pieces = [rounded(piece.float()) for piece in weight.split(step)]
    codes, scales = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    found = [piece[2] for piece in pieces if piece[2] is not None]
    return IntWeight(codes, scales, None, bits, group, offsets=torch.cat(found) if found else None)


def _symmetric_32(bits: int) -> Callable[[Tensor], Rounded]:
    """Make the rounding of Q4_0 and Q5_0: the value of largest magnitude gets the lowest code, whatever its sign."""

    def rounded(weight: Tensor) -> Rounded:
        groups = weight.unflatten(1, (-1, 32))
        middle = 2 ** (bits - 1)
        peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        scales = peak / -middle
        codes = (groups * _inverse(scales) + (middle + 0.5)).trunc().clamp(0, 2**bits - 1)
        return codes.to(torch.uint8).flatten(1), scales.squeeze(-1).half(), None

    return rounded


def _asymmetric_32(bits: int) -> Callable[[Tensor], Rounded]:
    """Make the rounding of Q4_1 and Q5_1, whose codes go from the least value to the largest."""

    def rounded(weight: Tensor) -> Rounded:
        groups = weight.unflatten(1, (-1, 32))
        low, top = groups.amin(-1, keepdim=True), 2**bits - 1
        scales = (groups.amax(-1, keepdim=True) - low) / top
        codes = ((groups - low) * _inverse(scales) + 0.5).trunc().clamp(0, top)
        return codes.to(torch.uint8).flatten(1), scales.squeeze(-1).half(), low.squeeze(-1).half()

    return rounded


def _q8_0(weight: Tensor) -> Rounded:
    groups = weight.unflatten(1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    values = groups * _inverse(scales)
    size = values.abs()
    whole = size.floor()
    whole += (2 * (size - whole)).floor()  # halves go away from zero
    codes = (whole * values.sign() + 128).to(torch.uint8)
    return codes.flatten(1), scales.squeeze(-1).half(), None


def _inverse(scales: Tensor) -> Tensor:
    """Return 1 / scales, and 0 for those that are 0."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def _symmetric_k(bits: int, group: int, scale_bits: int) -> Callable[[Tensor], Rounded]:
    """Make the rounding of Q3_K and Q6_K: w = d · s · (code - middle), s a signed integer of `scale_bits` bits."""

    def rounded(weight: Tensor) -> Rounded:
        blocks = weight.unflatten(1, (-1, K_VALUES // group, group))  # [N, K, S, G]
        middle, lowest = 2 ** (bits - 1), -(2 ** (scale_bits - 1))
        peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        best = torch.zeros_like(peak)
        most = torch.zeros_like(peak)  # squared error that the scale takes away
        for stretch in STRETCHES:
            codes = (blocks * _inverse(peak / -(middle + stretch))).round_().clamp_(-middle, middle - 1)
            product = (codes * blocks).sum(-1, keepdim=True)
            square = codes.square().sum(-1, keepdim=True)
            explained = product.square() / square.clamp(min=1)
            better = explained > most
            best = torch.where(better, product / square.clamp(min=1), best)
            most = torch.where(better, explained, most)
        best = best.squeeze(-1)  # [N, K, S]
        widest = best.gather(-1, best.abs().argmax(-1, keepdim=True))
        d = (widest / lowest).half().float()
        scales = d * (best * _inverse(d)).round().clamp(lowest, -lowest - 1)
        codes = (blocks * _inverse(scales.unsqueeze(-1))).round_().clamp_(-middle, middle - 1) + middle
        return codes.to(torch.uint8).flatten(1), scales.flatten(1), None

    return rounded


def _asymmetric_k(bits: int, group: int, scale_bits: int) -> Callable[[Tensor], Rounded]:
    """Make the rounding of Q2_K, Q4_K and Q5_K: w = d · s · code - dmin · m, s and m of `scale_bits` bits."""

    def rounded(weight: Tensor) -> Rounded:
        blocks = weight.unflatten(1, (-1, K_VALUES // group, group))  # [N, K, S, G]
        top, most = 2**bits - 1, 2**scale_bits - 1
        best, minima = _fit_ranges(blocks, top)
        d = (best.amax(-1, keepdim=True) / most).half().float()
        dmin = (minima.amax(-1, keepdim=True) / most).half().float()
        scales = d * (best * _inverse(d)).round().clamp(0, most)
        # For the scales as they are now, the minima that explain the values best.
        codes = _codes(blocks, scales, minima, top)
        wanted = (codes * scales.unsqueeze(-1) - blocks).mean(-1)
        offsets = dmin * (wanted * _inverse(dmin)).round().clamp(0, most)
        codes = _codes(blocks, scales, offsets, top)
        return codes.to(torch.uint8).flatten(1), scales.flatten(1), -offsets.flatten(1)

    return rounded


def _codes(blocks: Tensor, scales: Tensor, minima: Tensor, top: int) -> Tensor:
    """Choose the nearest codes 0..top of blocks [N, K, S, G] for scales and minima [N, K, S]."""
    return ((blocks + minima.unsqueeze(-1)) * _inverse(scales.unsqueeze(-1))).round_().clamp_(0, top)


def _fit_ranges(blocks: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Fit each group's scale and minimum, which is 0 or more and subtracted.  Returns both, [N, K, S]."""
    count = blocks.shape[-1]
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    width = blocks.amax(-1, keepdim=True) - low
    total, squares = blocks.sum(-1), blocks.square().sum(-1)
    scale, minimum = width.squeeze(-1) / top, -low.squeeze(-1)
    least = (_codes(blocks, scale, minimum, top) * scale.unsqueeze(-1) + low - blocks).square().sum(-1)
    shifted = (blocks - low) * _inverse(width)  # 0..1
    for stretch in STRETCHES:
        codes = (shifted * (top + stretch)).round_().clamp_(max=top)
        one, two = codes.sum(-1), codes.square().sum(-1)
        product = (codes * blocks).sum(-1)
        determinant = count * two - one.square()
        found = (count * product - total * one) / determinant.clamp(min=1)
        offset = (two * total - one * product) / determinant.clamp(min=1)
        # A minimum cannot be added: groups that would need it begin at zero.
        found = torch.where(offset > 0, product / two.clamp(min=1), found)
        offset = offset.clamp(max=0)
        error = squares + found * found * two + count * offset * offset
        error += 2 * (found * offset * one - found * product - offset * total)
        better = (error < least) & (determinant > 0) & (found > 0)
        least = torch.where(better, error, least)
        scale, minimum = torch.where(better, found, scale), torch.where(better, -offset, minimum)
    return scale, minimum


ROUNDING: dict[str, Callable[[Tensor], Rounded]] = {
    "Q4_0": _symmetric_32(4),
    "Q4_1": _asymmetric_32(4),
    "Q5_0": _symmetric_32(5),
    "Q5_1": _asymmetric_32(5),
    "Q8_0": _q8_0,
    "Q2_K": _asymmetric_k(2, 16, 4),
    "Q3_K": _symmetric_k(3, 16, 6),
    "Q4_K": _asymmetric_k(4, 32, 6),
    "Q5_K": _asymmetric_k(5, 32, 6),
    "Q6_K": _symmetric_k(6, 16, 8),
}
