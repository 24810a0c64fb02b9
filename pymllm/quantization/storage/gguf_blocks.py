"""What the bytes of GGUF's block types mean: codes, scales and offsets of each.

A block of 32 values has a float16 scale d, codes, and in some types a float16 minimum. A block of 256 values mostly has
small integers that scale its groups, and float16 scales of those: w = d·s·code - dmin·m, or d·s·(code - middle). The IQ
types name entries of a grid (`gguf_grids.py`) or values of a codebook. The layouts: quantization/gguf/README.md.
"""

# N rows, K blocks of a row

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.native.stored_codes import split_fields, splits_here
from pymllm.quantization.storage.gguf_grids import grid

# What blocks [N, K, bytes] hold: codes [N, K, values], scales [N, K, groups], and offsets alike where groups have them.
Decoded = tuple[Tensor, Tensor, Tensor | None]


def _half(blocks: Tensor, start: int) -> Tensor:
    """Read the float16 that begins at a byte of every block: [N, K, bytes] -> [N, K, 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _fields(bytes_: Tensor, bits: int) -> Tensor:
    """Unpack fields of `bits` bits: [..., n] bytes -> [..., 8/bits, n], all bytes' lowest fields, then the next."""
    rows = bytes_.flatten(0, -2) if bytes_.is_cpu and bytes_.ndim > 1 else bytes_
    if splits_here(rows):
        return split_fields(rows, bits, planes=True).view(*bytes_.shape[:-1], 8 // bits, bytes_.shape[-1])
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_.device)
    return (bytes_.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (2**bits - 1)


def _bits_of(word: Tensor) -> Tensor:
    """Unpack single bits: [N, K, 4] bytes -> [N, K, 32] bits, the lowest of the first byte first."""
    return _fields(word, 1).transpose(-1, -2).flatten(-2)


def _q4_0(b: Tensor) -> Decoded:
    return _fields(b[..., 2:], 4).flatten(-2), _half(b, 0), None


def _q4_1(b: Tensor) -> Decoded:
    return _fields(b[..., 4:], 4).flatten(-2), _half(b, 0), _half(b, 2)


def _q5_0(b: Tensor) -> Decoded:
    return _fields(b[..., 6:], 4).flatten(-2) | _bits_of(b[..., 2:6]) << 4, _half(b, 0), None


def _q5_1(b: Tensor) -> Decoded:
    return _fields(b[..., 8:], 4).flatten(-2) | _bits_of(b[..., 4:8]) << 4, _half(b, 0), _half(b, 2)


def _q8_0(b: Tensor) -> Decoded:
    return b[..., 2:] ^ 0x80, _half(b, 0), None  # two's complement → code of middle 128


def _q2_k(b: Tensor) -> Decoded:
    codes = _fields(b[..., 16:80].unflatten(-1, (2, 32)), 2).flatten(-3)
    scales = _half(b, 80).float() * (b[..., :16] & 15)
    return codes, scales, -(_half(b, 82).float() * (b[..., :16] >> 4))


def _q3_k(b: Tensor) -> Decoded:
    low = _fields(b[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3)
    high = _fields(b[..., :32], 1).flatten(-2)  # a set bit is 4; q - 4 where it is not
    nibbles = _fields(b[..., 96:104], 4).flatten(-2)
    scales = nibbles | _fields(b[..., 104:108], 2).flatten(-2) << 4
    return low | high << 2, _half(b, 108).float() * (scales.float() - 32), None


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the scales and minima, of 6 bits each, of Q4_K and Q5_K: [N, K, 12] bytes -> [N, K, 8] both."""
    first, second, both = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, both & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, both >> 4 | second >> 6 << 4), dim=-1)
    return scales, minima


def _q4_k(b: Tensor) -> Decoded:
    codes = _fields(b[..., 16:].unflatten(-1, (4, 32)), 4).flatten(-3)
    scales, minima = _k_scales(b[..., 4:16])
    return codes, _half(b, 0).float() * scales, -(_half(b, 2).float() * minima)


def _q5_k(b: Tensor) -> Decoded:
    low = _fields(b[..., 48:].unflatten(-1, (4, 32)), 4).flatten(-3)
    high = _fields(b[..., 16:48], 1).flatten(-2)
    scales, minima = _k_scales(b[..., 4:16])
    return low | high << 4, _half(b, 0).float() * scales, -(_half(b, 2).float() * minima)


def _q6_k(b: Tensor) -> Decoded:
    low = _fields(b[..., :128].unflatten(-1, (2, 64)), 4).flatten(-3)
    high = _fields(b[..., 128:192].unflatten(-1, (2, 32)), 2).flatten(-3)
    scales = b[..., 192:208].contiguous().view(torch.int8)
    return low | high << 4, _half(b, 208).float() * scales, None


def _words(bytes_: Tensor) -> Tensor:
    """Read pairs of bytes as 16-bit numbers, the lower byte first: [..., 2n] uint8 -> [..., n] int32."""
    pairs = bytes_.unflatten(-1, (-1, 2)).int()
    return pairs[..., 0] | pairs[..., 1] << 8


def _nibbles(bytes_: Tensor) -> Tensor:
    """Unpack nibbles, the low one of each byte first: [..., n] bytes -> [..., 2n]."""
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(-2)


def _halves(bytes_: Tensor, group: int) -> Tensor:
    """Unpack groups whose first half lies in the low nibbles: [..., n] bytes -> [..., 2n] codes."""
    return _fields(bytes_.unflatten(-1, (-1, group // 2)), 4).flatten(-3)


def _mxfp4(b: Tensor) -> Decoded:
    return _halves(b[..., 1:], 32), b[..., :1].contiguous().view(torch.float8_e8m0fnu), None


def _nvfp4(b: Tensor) -> Decoded:
    return _halves(b[..., 4:], 16), b[..., :4].contiguous().view(torch.float8_e4m3fn), None


def _q1_0(b: Tensor) -> Decoded:
    return _bits_of(b[..., 2:]) << 1, _half(b, 0), None  # 0 or 2, and the zero point is 1


def _q2_0(b: Tensor) -> Decoded:
    return _fields(b[..., 2:], 2).transpose(-1, -2).flatten(-2), _half(b, 0), None


def _trits(bytes_: Tensor, count: int) -> Tensor:
    """Unpack base-3 digits: [..., n] bytes -> [..., count · n], all bytes' first digits, then the next.

    A byte is 256/243 of the number, rounded up.  Digit i: of 3 times (3^i times the byte, modulo 256) what is above 8
    bits.
    """
    powers = torch.tensor([3**i for i in range(count)], dtype=torch.int32, device=bytes_.device)
    left = bytes_.int().unsqueeze(-2) * powers.unsqueeze(-1) & 255
    return (left * 3 >> 8).to(torch.uint8).flatten(-2)


def _tq1_0(b: Tensor) -> Decoded:
    digits = (_trits(b[..., :32], 5), _trits(b[..., 32:48], 5), _trits(b[..., 48:52], 4))
    return torch.cat(digits, dim=-1), _half(b, 52), None


def _tq2_0(b: Tensor) -> Decoded:
    return _fields(b[..., :64].unflatten(-1, (2, 32)), 2).flatten(-3), _half(b, 64), None


def _iq4_nl(b: Tensor) -> Decoded:
    return _halves(b[..., 2:], 32), _half(b, 0), None


def _iq4_xs(b: Tensor) -> Decoded:
    high = _fields(b[..., 2:4], 2).transpose(-1, -2).flatten(-2)
    scales = _nibbles(b[..., 4:8]) | high << 4
    return _halves(b[..., 8:], 32), _half(b, 0).float() * (scales.float() - 32), None


def _entries(name: str, index: Tensor) -> Tensor:
    """Look entries of a grid up: [N, K, n] indices -> [N, K, n, values of an entry] levels."""
    return grid(name, index.device)[index.int()]


def _with_signs(levels: Tensor, signs: Tensor) -> Tensor:
    """Make codes of levels [N, K, n, values] and a bit for each value, in bytes [N, K, n · values / 8].

    A set bit is worth 8: it asks for the other half of the codebook.
    """
    return levels.flatten(-2) | _bits_of(signs) << 3


def _sign_bytes(index: Tensor) -> Tensor:
    """Complete 7 signs, the lowest bit first, with an eighth that makes the number of set bits even."""
    parity = index ^ index >> 4
    parity = parity ^ parity >> 2
    return (index | ((parity ^ parity >> 1) & 1) << 7).to(torch.uint8)


def _signs_and_scale(words: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack 32-bit numbers: [..., 4n] bytes -> four bytes of signs each, [..., 4n], and their top 4 bits, [..., n]."""
    octets = words.unflatten(-1, (-1, 4)).int()
    low = octets[..., 0] | octets[..., 1] << 8 | octets[..., 2] << 16 | (octets[..., 3] & 15) << 24
    shifts = torch.arange(0, 28, 7, dtype=torch.int32, device=words.device)
    return _sign_bytes(low.unsqueeze(-1) >> shifts & 127).flatten(-2), octets[..., 3] >> 4


def _iq2_xxs(b: Tensor) -> Decoded:
    octets = b[..., 2:].unflatten(-1, (8, 8))  # for 32 values, four entries and a number of signs and scale
    signs, scales = _signs_and_scale(octets[..., 4:].flatten(-2))
    codes = _with_signs(_entries("iq2_xxs", octets[..., :4].flatten(-2)), signs)
    return codes, _half(b, 0).float() * (scales + 0.5) * 0.25, None


def _iq2_xs(b: Tensor) -> Decoded:
    words = _words(b[..., 2:66])
    codes = _with_signs(_entries("iq2_xs", words & 511), _sign_bytes(words >> 9))
    return codes, _half(b, 0).float() * (_nibbles(b[..., 66:]) + 0.5) * 0.25, None


def _iq2_s(b: Tensor) -> Decoded:
    high = _fields(b[..., 66:74], 2).transpose(-1, -2).flatten(-2).int()
    codes = _with_signs(_entries("iq2_s", b[..., 2:34].int() | high << 8), b[..., 34:66])
    return codes, _half(b, 0).float() * (_nibbles(b[..., 74:]) + 0.5) * 0.25, None


def _iq3_xxs(b: Tensor) -> Decoded:
    signs, scales = _signs_and_scale(b[..., 66:])
    codes = _with_signs(_entries("iq3_xxs", b[..., 2:66]), signs)
    return codes, _half(b, 0).float() * (scales + 0.5) * 0.5, None


def _iq3_s(b: Tensor) -> Decoded:
    index = b[..., 2:66].int() | _bits_of(b[..., 66:74]).int() << 8
    codes = _with_signs(_entries("iq3_s", index), b[..., 74:106])
    return codes, _half(b, 0).float() * (2 * _nibbles(b[..., 106:]) + 1), None


def _iq1_s(b: Tensor) -> Decoded:
    words = _words(b[..., 34:]).unsqueeze(-1)  # [N, K, 8, 1]
    high = (words >> torch.arange(0, 12, 3, device=b.device) & 7).flatten(-2)
    levels = _entries("iq1", b[..., 2:34].int() | high << 8).unflatten(-2, (8, 4))
    codes = levels | (words >> 15 << 3).to(torch.uint8).unsqueeze(-1)
    return codes.flatten(-3), _half(b, 0).float() * (2 * (words[..., 0] >> 12 & 7) + 1), None


def _iq1_m_scale(b: Tensor) -> Tensor:
    """Put the float16 scale together that lies in the highest four bits of four 16-bit numbers: [N, K, 1]."""
    nibbles = (b[..., 49::2] >> 4).contiguous()  # [N, K, 4], the lowest first
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(torch.float16)


def _iq1_m(b: Tensor) -> Decoded:
    high = _nibbles(b[..., 32:48])  # of 8 values: three bits of the entry, and the sign of the eighth
    levels = _entries("iq1", b[..., :32].int() | (high & 7).int() << 8)
    codes = levels | (high & 8).unsqueeze(-1)
    scales = _words(b[..., 48:]).unsqueeze(-1) >> torch.arange(0, 12, 3, device=b.device) & 7
    return codes.flatten(-2), _iq1_m_scale(b).float() * (2 * scales.flatten(-2) + 1), None


@dataclass(frozen=True)
class BlockType:
    """A block type of GGUF.

    values, size: how many values and bytes a block has.  group: how many values share a scale.
    decode: unpacks blocks.  scales: the dtype of the scales that it gives.  offsets: whether it gives offsets.
    bits: of a code of an integer.  zero: the zero point; None: the middle code.
    codebook: the name of the codebook; "": the codes are integers.
    halves: the bytes where float16 numbers begin.  bad: marks blocks whose scales, stored otherwise, are not numbers.
    """

    values: int
    size: int
    group: int
    decode: Callable[[Tensor], Decoded]
    scales: torch.dtype = torch.float32
    halves: tuple[int, ...] = (0,)
    bits: int = 0
    zero: int | None = None
    offsets: bool = False
    codebook: str = ""
    bad: Callable[[Tensor], Tensor] | None = None

    def count_bad(self, blocks: Tensor) -> int:
        """Count, of blocks [N, K, bytes], those with a scale or minimum that is NaN or infinite."""
        found = sum(int((~_half(blocks, at).isfinite()).sum()) for at in self.halves)
        return found if self.bad is None else int(self.bad(blocks).sum())


def _bad_e8m0(blocks: Tensor) -> Tensor:
    return blocks[..., 0] == 255  # NaN


def _bad_e4m3(blocks: Tensor) -> Tensor:
    return (blocks[..., :4] >= 127).any(-1)  # NaN, or a sign, which these have not


def _bad_iq1_m(blocks: Tensor) -> Tensor:
    return ~_iq1_m_scale(blocks).isfinite()


F16, F32 = torch.float16, torch.float32
BLOCKS = {
    "Q4_0": BlockType(32, 18, 32, _q4_0, F16, bits=4),
    "Q4_1": BlockType(32, 20, 32, _q4_1, F16, (0, 2), bits=4, offsets=True),
    "Q5_0": BlockType(32, 22, 32, _q5_0, F16, bits=5),
    "Q5_1": BlockType(32, 24, 32, _q5_1, F16, (0, 2), bits=5, offsets=True),
    "Q8_0": BlockType(32, 34, 32, _q8_0, F16, bits=8),
    "Q2_K": BlockType(256, 84, 16, _q2_k, F32, (80, 82), bits=2, offsets=True),
    "Q3_K": BlockType(256, 110, 16, _q3_k, F32, (108,), bits=3),
    "Q4_K": BlockType(256, 144, 32, _q4_k, F32, (0, 2), bits=4, offsets=True),
    "Q5_K": BlockType(256, 176, 32, _q5_k, F32, (0, 2), bits=5, offsets=True),
    "Q6_K": BlockType(256, 210, 16, _q6_k, F32, (208,), bits=6),
    "IQ1_S": BlockType(256, 50, 32, _iq1_s, codebook="iq1"),
    "IQ1_M": BlockType(256, 56, 16, _iq1_m, halves=(), codebook="iq1", bad=_bad_iq1_m),
    "IQ2_XXS": BlockType(256, 66, 32, _iq2_xxs, codebook="iq2"),
    "IQ2_XS": BlockType(256, 74, 16, _iq2_xs, codebook="iq2"),
    "IQ2_S": BlockType(256, 82, 16, _iq2_s, codebook="iq2"),
    "IQ3_XXS": BlockType(256, 98, 32, _iq3_xxs, codebook="iq3_xxs"),
    "IQ3_S": BlockType(256, 110, 32, _iq3_s, codebook="iq3_s"),
    "IQ4_NL": BlockType(32, 18, 32, _iq4_nl, F16, codebook="iq4"),
    "IQ4_XS": BlockType(256, 136, 32, _iq4_xs, codebook="iq4"),
    "TQ1_0": BlockType(256, 54, 256, _tq1_0, F16, (52,), bits=2, zero=1),
    "TQ2_0": BlockType(256, 66, 256, _tq2_0, F16, (64,), bits=2, zero=1),
    "Q1_0": BlockType(128, 18, 128, _q1_0, F16, bits=2, zero=1),
    "Q2_0": BlockType(64, 18, 64, _q2_0, F16, bits=2, zero=1),
    "MXFP4": BlockType(32, 17, 32, _mxfp4, torch.float8_e8m0fnu, (), codebook="e2m1", bad=_bad_e8m0),
    "NVFP4": BlockType(64, 36, 16, _nvfp4, torch.float8_e4m3fn, (), codebook="e2m1", bad=_bad_e4m3),
}
