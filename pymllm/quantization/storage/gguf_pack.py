"""Canonical weights to the bytes of GGUF's blocks: the decoders of `gguf_blocks.py` undone, value for value.

A K type stores a group's scale as a small integer times a float16; which ones is found from the scales alone. Where
several are right, the bytes may not be those of the file that the weight came from, but they mean the same numbers.
"""

# N rows, K blocks of a row, S groups of a block

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, IntWeight
from pymllm.quantization.storage.fp4_linear import fp4_kind
from pymllm.quantization.storage.gguf_blocks import BLOCKS

HALF = torch.float16


def pack_blocks(weight: CanonicalWeight, kind: str) -> Tensor | None:
    """Pack a weight [O, I] into [O, bytes] of a type.  kind: a key of PACKERS.

    Returns None where the type cannot hold exactly this weight.
    """
    values, groups, pack = PACKERS[kind]
    if kind == "MXFP4":
        return _mxfp4(weight) if fp4_kind(weight) == "mxfp4" else None
    if not isinstance(weight, IntWeight) or not plain_integers(weight, kind):
        return None
    width = values // groups  # values that share a scale
    if weight.group_size % width or weight.scales.shape[1] * weight.group_size != weight.shape[1]:
        return None
    repeats = weight.group_size // width

    def by_block(numbers: Tensor) -> Tensor:  # [O, I/G] -> [O, K, S]
        return numbers.repeat_interleave(repeats, dim=1).float().unflatten(1, (-1, groups))

    offsets = None if weight.offsets is None else by_block(weight.offsets)
    packed = pack(weight.codes.unflatten(1, (-1, values)), by_block(weight.scales), offsets)
    return None if packed is None else packed.flatten(1)


def plain_integers(weight: IntWeight, kind: str) -> bool:
    """Tell whether a weight's codes can be those of a type, whatever its scales are."""
    block = BLOCKS[kind]
    ordered = weight.group_index is None and weight.input_order is None and weight.zeros is None
    fits = block.bits == weight.bits and block.offsets == (weight.offsets is not None)
    return ordered and fits and not block.codebook and block.zero is None and weight.activations == "float"


def _mxfp4(weight: CanonicalWeight) -> Tensor:
    """Pack MXFP4: an exponent, then codes of which the first sixteen are low nibbles."""
    assert isinstance(weight, CodebookWeight)
    exponents = weight.scales.view(torch.uint8).unsqueeze(-1)
    return torch.cat((exponents, _join(weight.codes.unflatten(1, (-1, 32)), 4)), dim=-1).flatten(1)


def _join(codes: Tensor, bits: int) -> Tensor:
    """Pack fields of `bits` bits: [..., 8/bits · n] -> [..., n] bytes, the first n fields lowest."""
    fields = codes.unflatten(-1, (8 // bits, -1))
    joined = torch.zeros_like(fields[..., 0, :])
    for index in range(8 // bits):
        joined |= fields[..., index, :] << (bits * index)
    return joined


def _bits_to_word(bits: Tensor) -> Tensor:
    """Pack single bits: [N, K, 32] -> [N, K, 4] bytes, the lowest bit of the first byte first."""
    return _join(bits.unflatten(-1, (4, 8)).transpose(-1, -2).flatten(-2), 1)


def _bytes_of(numbers: Tensor) -> Tensor:
    """Write float16 numbers [N, K, 1] as their bytes [N, K, 2]."""
    return numbers.to(HALF).contiguous().view(torch.uint8)


def _halves(*numbers: Tensor) -> Tensor | None:
    """Write numbers [N, K, 1] as float16, one behind the other.  Returns None where float16 would round one."""
    if not all(torch.equal(number.half().float(), number) for number in numbers):
        return None
    return torch.cat([_bytes_of(number) for number in numbers], dim=-1)


def _four(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    halves = _halves(scales) if offsets is None else _halves(scales, offsets)
    return None if halves is None else torch.cat((halves, _join(codes, 4)), dim=-1)


def _five(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    halves = _halves(scales) if offsets is None else _halves(scales, offsets)
    if halves is None:
        return None
    return torch.cat((halves, _bits_to_word(codes >> 4), _join(codes & 15, 4)), dim=-1)


def _eight(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    halves = _halves(scales)
    return None if halves is None else torch.cat((halves, codes ^ 0x80), dim=-1)


def _q2_k(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    parts = _scales_and_minima(scales, offsets, 15)
    if parts is None:
        return None
    (s, d), (m, dmin) = parts
    low = _join(codes.unflatten(-1, (2, 128)), 2).flatten(-2)
    return torch.cat((s | m << 4, low, _bytes_of(d), _bytes_of(dmin)), dim=-1)


def _q3_k(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    parts = split_scales(scales, (*range(-32, 0), *range(31, 0, -1)))
    if parts is None:
        return None
    s, d = (parts[0] + 32).to(torch.uint8), parts[1]
    low = _join((codes & 3).unflatten(-1, (2, 128)), 2).flatten(-2)
    return torch.cat((_join(codes >> 2, 1), low, _join(s & 15, 4), _join(s >> 4, 2), _bytes_of(d)), dim=-1)


def _q4_k(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    head = _k_head(scales, offsets)
    low = _join(codes.unflatten(-1, (4, 64)), 4).flatten(-2)
    return None if head is None else torch.cat((head, low), dim=-1)


def _q5_k(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    head = _k_head(scales, offsets)
    low = _join((codes & 15).unflatten(-1, (4, 64)), 4).flatten(-2)
    return None if head is None else torch.cat((head, _join(codes >> 4, 1), low), dim=-1)


def _q6_k(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    parts = split_scales(scales, (-128, *range(-127, 0), *range(127, 0, -1)))
    if parts is None:
        return None
    s, d = parts
    low = _join((codes & 15).unflatten(-1, (2, 128)), 4).flatten(-2)
    high = _join((codes >> 4).unflatten(-1, (2, 128)), 2).flatten(-2)
    return torch.cat((low, high, s.to(torch.int8).view(torch.uint8), _bytes_of(d)), dim=-1)


def _k_head(scales: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Write what Q4_K and Q5_K begin with: d, dmin, and eight scales and minima of 6 bits each."""
    parts = _scales_and_minima(scales, offsets, 63)
    if parts is None:
        return None
    (s, d), (m, dmin) = parts
    first = s[..., :4] | s[..., 4:] >> 4 << 6
    second = m[..., :4] | m[..., 4:] >> 4 << 6
    both = s[..., 4:] & 15 | (m[..., 4:] & 15) << 4
    return torch.cat((_bytes_of(d), _bytes_of(dmin), first, second, both), dim=-1)


def _scales_and_minima(
    scales: Tensor, offsets: Tensor | None, top: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Split scales and minima [N, K, S] into bytes 0..top and what they are multiplied by, [N, K, 1] each."""
    minima = torch.zeros_like(scales) if offsets is None else -offsets
    both = [split_scales(numbers, range(top, 0, -1)) for numbers in (scales, minima)]
    if both[0] is None or both[1] is None:
        return None
    (s, d), (m, dmin) = both[0], both[1]
    return (s.to(torch.uint8), d), (m.to(torch.uint8), dmin)


def split_scales(scales: Tensor, integers: range | tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Split scales [N, K, S] into integers and one float16 a block, whose products they are exactly.

    integers: those that the largest scale of a block may have, the likeliest first; others lie between them, or are 0.
    Returns the integers [N, K, S] as int16 and the factors [N, K, 1] float32, or None where there are none.
    """
    flat = scales.flatten(0, -2)  # [N·K, S]
    widest = flat.gather(-1, flat.abs().argmax(-1, keepdim=True))
    low, high = min(0, *integers), max(integers)
    found = torch.zeros(flat.shape, dtype=torch.int16)
    factors = torch.zeros_like(widest)
    left = widest.squeeze(-1).nonzero().squeeze(-1)  # blocks of zeros are done
    for integer in integers:
        if not left.numel():
            break
        factor = (widest[left] / integer).half().float()
        whole = (flat[left] / torch.where(factor == 0, 1.0, factor)).round()
        right = ((whole * factor == flat[left]) & (whole >= low) & (whole <= high)).all(-1)
        done = left[right]
        found[done], factors[done] = whole[right].to(torch.int16), factor[right]
        left = left[~right]
    if left.numel():
        return None
    return found.unflatten(0, scales.shape[:-1]), factors.unflatten(0, scales.shape[:-1])


# Type -> values of a block, groups of a block, what packs codes [N, K, values], scales and offsets [N, K, groups].
Packer = Callable[[Tensor, Tensor, "Tensor | None"], "Tensor | None"]
PACKERS: dict[str, tuple[int, int, Packer]] = {
    "Q4_0": (32, 1, _four),
    "Q4_1": (32, 1, _four),
    "Q5_0": (32, 1, _five),
    "Q5_1": (32, 1, _five),
    "Q8_0": (32, 1, _eight),
    "Q2_K": (256, 16, _q2_k),
    "Q3_K": (256, 16, _q3_k),
    "Q4_K": (256, 8, _q4_k),
    "Q5_K": (256, 8, _q5_k),
    "Q6_K": (256, 16, _q6_k),
    "MXFP4": (32, 1, lambda codes, scales, offsets: None),  # whose weights have a codebook: `_mxfp4`
}
