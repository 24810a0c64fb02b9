"""GGUF's block types: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, and the K types Q2_K to Q6_K.

    weight uint8 [O, I/B · bytes of a block]   blocks of B values, one after the other along the inputs

A block of 32 values has a float16 scale d, codes, and in some types a float16 minimum. A block of 256 values has small
integers that scale its groups, and float16 scales of those: w = d·s·code - dmin·m, or d·s·(code - middle). The page
with the layout: quantization/gguf/README.md.

A GGUF file has no quantization_config: `weights/gguf_checkpoint.py` makes one from the type of every tensor.
"""

# N rows, K blocks of a row, O out_features, I in_features

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fields import unsupported
from pymllm.weights.spec import IN, OUT, LinearShape, WeightSpec

# What blocks [N, K, bytes] hold: codes [N, K, values], scales [N, K, groups], and offsets alike where groups have them.
Decoded = tuple[Tensor, Tensor, Tensor | None]


def _half(blocks: Tensor, start: int) -> Tensor:
    """Read the float16 that begins at a byte of every block: [N, K, bytes] -> [N, K, 1]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16)


def _fields(bytes_: Tensor, bits: int) -> Tensor:
    """Unpack fields of `bits` bits: [..., n] bytes -> [..., 8/bits, n], all bytes' lowest fields, then the next."""
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


@dataclass(frozen=True)
class BlockType:
    """A block type of GGUF.

    values, size: how many values and bytes a block has.  bits: of a code.  group: how many values share a scale.
    halves: the bytes where float16 numbers begin.  decode: unpacks blocks.
    """

    values: int
    size: int
    bits: int
    group: int
    halves: tuple[int, ...]
    decode: Callable[[Tensor], Decoded]


BLOCKS = {
    "Q4_0": BlockType(32, 18, 4, 32, (0,), _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, (0, 2), _q4_1),
    "Q5_0": BlockType(32, 22, 5, 32, (0,), _q5_0),
    "Q5_1": BlockType(32, 24, 5, 32, (0, 2), _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, (0,), _q8_0),
    "Q2_K": BlockType(256, 84, 2, 16, (80, 82), _q2_k),
    "Q3_K": BlockType(256, 110, 3, 16, (108,), _q3_k),
    "Q4_K": BlockType(256, 144, 4, 32, (0, 2), _q4_k),
    "Q5_K": BlockType(256, 176, 5, 32, (0, 2), _q5_k),
    "Q6_K": BlockType(256, 210, 6, 16, (208,), _q6_k),
}
ROWS_BYTES = 16 << 20  # how much is decoded at a time; temporaries take a few times as much


@dataclass(frozen=True)
class GGUFLinearMethod(LinearMethodBase):
    """GGUF's weights.  kind: the name of their block type."""

    kind: str
    name: ClassVar[str] = "gguf"

    @property
    def block(self) -> BlockType:
        return BLOCKS[self.kind]

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        blocks = IN.in_blocks(self.block.values, self.block.size)
        return (WeightSpec("weight", torch.uint8, (OUT, blocks), refuse=self._refuse),)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        stored, block = tensors["weight"], self.block
        rows, count = stored.shape[0], stored.shape[1] // block.size
        codes = stored.new_empty((rows, count * block.values))
        step = max(1, ROWS_BYTES // max(stored.shape[1], 1))
        scales, offsets = [], []
        for piece, target in zip(stored.split(step), codes.split(step), strict=True):
            decoded = block.decode(piece.unflatten(1, (count, block.size)))
            target.copy_(decoded[0].flatten(1))
            scales.append(decoded[1].flatten(1))
            if decoded[2] is not None:
                offsets.append(decoded[2].flatten(1))
        return IntWeight(
            codes,
            torch.cat(scales),
            None,
            block.bits,
            block.group,
            offsets=torch.cat(offsets) if offsets else None,
        )

    def _refuse(self, stored: Tensor, shape: LinearShape) -> str | None:
        """Refuse blocks whose scale or minimum is not finite.  Zero is right: a block of zeros has it."""
        blocks = stored.unflatten(1, (-1, self.block.size))
        bad = sum(int((~_half(blocks, at).isfinite()).sum()) for at in self.block.halves)
        return f"{bad} blocks of {self.kind} whose scale or minimum is NaN or infinite" if bad else None

    def describe(self) -> str:
        return f"gguf {self.kind}"


@register_quantization("gguf")
class GGUFConfig(QuantizationConfig):
    """The config of a GGUF file.  types: the block type of every quantised tensor, by its layer."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types = dict(types.items())

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GGUFConfig:
        types: Any = config.get("types")
        if not isinstance(types, Mapping) or not all(isinstance(kind, str) for kind in types.values()):
            raise unsupported("GGUF", "types", types, "an object of layer to type")
        for layer, kind in types.items():
            if kind not in BLOCKS:
                raise unsupported(
                    "GGUF", "type", kind, f"F32 or F16 or BF16 or {' or '.join(BLOCKS)}", within=f"{layer}."
                )
        return cls(types)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        kind = self.types.get(prefix)
        return None if kind is None else GGUFLinearMethod(kind)
