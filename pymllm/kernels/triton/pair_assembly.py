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


@dataclass(frozen=True)
class Assembly:
    """The text that decodes a word.

    text: operands 0..N-1 are the floats, the low and the high one of each pair; then come the word, and the pair to add
    to each: `bias` less the zero point.  factor: a decoded number times it is what the code means.
    """

    text: str = ""
    bias: float = 0.0
    factor: float = 1.0


Assemblies = Callable[[torch.dtype], Assembly]


def no_assembly(dtype: torch.dtype) -> Assembly:
    return Assembly()


def decode_pairs(per_word: int, pair: Callable[[int], str], bias: float, factor: float = 1.0) -> Assembly:
    """Make the text from that of each pair.

    pair: from n, instructions that leave pair n in `p`; they may use `q`, `one` (two bfloat16 ones), and the operands
    {word} and {add}.
    """
    text = ["{ .reg .b32 p, q, one; mov.b32 one, 0x3F803F80;"]
    for n in range(per_word // 2):
        body = pair(n).replace("{word}", f"${per_word}").replace("{add}", f"${per_word + 1}")
        text.append(f"{body} mov.b32 {{${2 * n}, ${2 * n + 1}}}, p;")
    return Assembly("\n".join([*text, "}"]), bias, factor)


def shifted(operand: str, by: int) -> str:
    """Put the word, `by` bits nearer to the low end, into `p`."""
    if by == 0:
        return f"mov.b32 p, {operand};"
    return f"sh{'r' if by > 0 else 'l'}.b32 p, {operand}, {abs(by)};"
