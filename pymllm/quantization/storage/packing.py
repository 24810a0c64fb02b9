"""Packing that several formats share: small fields in words, and the codes of 4-bit and 8-bit floats."""

# N rows, K columns

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.kernels.activations import nearest_e2m1
from pymllm.kernels.canonical import has_nan_e4m3
from pymllm.kernels.native.stored_codes import split_fields, split_rows, splits_here

# Values of the 4-bit codes 0..15; codes from 8 on are the negatives of those from 0.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


SPLIT = (2, 4, 8)  # bits of fields that native code takes out of words


def as_bytes(words: Tensor) -> Tensor:
    """Return the bytes of [N, K] int32 words as [N, 4·K], the lowest of a word first."""
    return words.contiguous().flatten().view(torch.uint8).unflatten(0, (words.shape[0], -1))


def unpack_fields(words: Tensor, bits: int) -> Tensor:
    """Unpack [N, K·bits/32] int32 words to [N, K] uint8 fields, the lowest bits of a word first.  bits: 2, 4 or 8.

    It works on bytes, so that no temporary is larger than the result.
    """
    if bits in SPLIT and splits_here(words.t()):
        return split_rows(words.t(), bits)  # words that lie the other way, as GPTQ has them
    octets = as_bytes(words)
    if bits == 8:
        return octets
    if splits_here(octets):
        return split_fields(octets, bits)
    fields = torch.empty((*octets.shape, 8 // bits), dtype=torch.uint8, device=octets.device)
    # A plan needs the shape alone, and torch's bit operations on meta tensors would load its compiler (0.7 s).
    for index in range(0 if fields.is_meta else 8 // bits):
        fields[..., index] = (octets >> (bits * index)) & (2**bits - 1)
    return fields.flatten(-2)


def unpack_nibbles_low_first(packed: Tensor) -> Tensor:
    """Unpack [N, K/2] bytes to [N, K] uint8 codes, the low nibble first."""
    if packed.dtype is torch.uint8 and splits_here(packed):
        return split_fields(packed, 4)
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles_low_first(codes: Tensor) -> Tensor:
    """Pack [N, K] uint8 codes into [N, K/2] bytes, the inverse of `unpack_nibbles_low_first`.  K is even."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles_high_first(packed: Tensor) -> Tensor:
    """Unpack [N, K/2] bytes to [N, K] uint8 codes, the high nibble first."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


def encode_e2m1(values: Tensor) -> Tensor:
    """Encode values as the uint8 codes 0..15 of the nearest that E2M1 holds, ties to even codes, ±6 for larger ones."""
    magnitudes = torch.tensor(E2M1[:8], device=values.device)
    codes = torch.searchsorted(magnitudes, nearest_e2m1(values).abs().contiguous())
    return codes.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unpack [N, ceil(K·bits/32)] int32 words to [N, K'] uint8 fields, the lowest bits of a word first.

    bits: 1 to 8.  K': as many fields as fill the words, K or more.  Fields lie without gaps; where `bits` does not
    divide 32, some lie across two words.
    """
    if 8 % bits == 0 and bits > 1:
        return unpack_fields(words, bits)
    octets = as_bytes(words)
    rows, stored = octets.shape
    octets = torch.nn.functional.pad(octets, (0, -stored % bits + bits))  # whole runs, and one after the last
    runs = octets.shape[1] // bits - 1  # eight fields lie in `bits` bytes
    fields = torch.empty((rows, runs, 8), dtype=torch.uint8, device=words.device)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        low, high = octets[:, byte::bits][:, :runs], octets[:, byte + 1 :: bits][:, :runs]
        field = (low >> shift) | (high << (8 - shift)) if shift else low
        fields[:, :, index] = field & (2**bits - 1)
    return fields.flatten(1)[:, : stored * 8 // bits]


def pack_words(fields: Tensor, bits: int) -> Tensor:
    """Pack [N, K] fields into [N, ceil(K·bits/32)] int32 words, with zeros after the last: `unpack_words` undone."""
    wide = torch.nn.functional.pad(fields.to(torch.int64), (0, -fields.shape[1] % 32)).unflatten(1, (-1, 32))
    start = torch.arange(32, device=fields.device) * bits
    words = torch.zeros((*wide.shape[:2], bits + 1), dtype=torch.int64, device=fields.device)
    words.index_add_(2, start // 32, (wide << (start % 32)) & 0xFFFFFFFF)
    words.index_add_(2, start // 32 + 1, (wide << (start % 32)) >> 32)
    return words[:, :, :bits].flatten(1)[:, : -(-fields.shape[1] * bits // 32)].to(torch.int32)


ROWS_AT_A_TIME = 4096  # bounds the memory that looking for NaN codes takes
E8M0_NAN = 255


def refuse_wide_codes(bits: int) -> Callable[[Tensor, object], str | None] | None:
    """Make a `WeightSpec.refuse` for signed codes in bytes that do not fit in `bits` bits; None: all bytes do."""
    return None if bits == 8 else functools.partial(_refuse_wide, bits=bits)


def _refuse_wide(codes: Tensor, shape: object, bits: int) -> str | None:
    low, high = (int(edge) for edge in torch.aminmax(codes)) if codes.numel() else (0, 0)
    if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
        return None
    return f"codes from {low} to {high}, which {bits} bits, as the config has it, do not hold"


def refuse_nan_scales(scales: Tensor, shape: object) -> str | None:
    """Refuse NaN among scales that are the exponents of powers of two.  For a `WeightSpec.refuse`."""
    bad = scales.view(torch.uint8) == E8M0_NAN
    return f"{int(bad.sum())} scales of {bad.numel()} that are NaN" if bool(bad.any()) else None


def refuse_nan_codes(stored: Tensor, shape: object) -> str | None:
    """Refuse float8_e4m3 codes that are NaN, which no writer makes of a weight.  For a `WeightSpec.refuse`."""
    if not has_nan_e4m3(stored):
        return None
    count = 0
    for codes in stored.view(torch.uint8).split(ROWS_AT_A_TIME):
        count += int(((codes & 0x7F) == 0x7F).sum())
    return f"{count} of {stored.numel()} fp8 codes that are NaN" if count else None
