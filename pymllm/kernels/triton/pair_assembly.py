"""PTX that decodes a word of codes into 16-bit floats, two by one instruction each.

The codes at one place of a word's low and high half become a pair of floats: masked, and put under an exponent by the
same `lop3`, they are exactly a power of two plus the code. The power and the zero point are then subtracted, exactly
too, so that no sum ever holds more than the product does.
"""

# N codes a word

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ONE = 0x3F80  # bfloat16


@dataclass(frozen=True)
class Assembly:
    """The text that decodes a word.

    text: operands 0..N-1 are the floats, the low and the high one of each pair; then come the word, and the pair to add
    to each: `bias` less the zero point.  factor: a decoded number times it is what the code means.
    """

    text: str = ""
    bias: float = 0.0
    factor: float = 1.0

    def added(self, zero: float, dtype: torch.dtype) -> int:
        """Return the bits of the pair to add, where all numbers have this zero point."""
        half = int(torch.tensor(self.bias - zero, dtype=dtype).view(torch.int16)) & 0xFFFF
        pair = half * 0x10001
        return pair - (1 << 32) if pair >> 31 else pair


Assemblies = Callable[[torch.dtype], Assembly]


def no_assembly(dtype: torch.dtype) -> Assembly:
    return Assembly()


def decode_pairs(per_word: int, pair: Callable[[int], str], bias: float, factor: float = 1.0) -> Assembly:
    """Make the text from that of each pair.

    pair: from n, instructions that leave pair n in `p`; they may use `q`, and the operands {word} and {add}.
    """
    text = ["{ .reg .b32 p, q, r;"]
    for n in range(per_word // 2):
        body = pair(n).replace("{word}", f"${per_word}").replace("{add}", f"${per_word + 1}")
        text.append(f"{body} mov.b32 {{${2 * n}, ${2 * n + 1}}}, p;")
    return Assembly("\n".join([*text, "}"]), bias, factor)


def shift(to: str, by: int) -> str:
    """Put the word, its bits `by` places nearer to the low end, into a register."""
    if by == 0:
        return f"mov.b32 {to}, {{word}};"
    return f"sh{'r' if by > 0 else 'l'}.b32 {to}, {{word}}, {abs(by)};"


def multiply_bfloat16(by: int) -> str:
    """Multiply the pair by a bfloat16, given by its bits, and add {add}."""
    # Before sm_90 a pair of bfloat16 has no instruction but this.
    return f"mov.b32 r, {by * 0x10001:#010x}; fma.rn.bf16x2 p, p, r, {{add}};"


def signed_pair(size: str, sign: int) -> str:
    """Put a size and a sign into `p`.  size: leaves it in `p`.  sign: the place of the sign's bit in each half."""
    return f"{size} {shift('q', sign - 15)} lop3.b32 p, q, 0x80008000, p, 0xEA;"
