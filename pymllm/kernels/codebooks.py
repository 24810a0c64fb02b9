"""Codebooks whose sixteen values are small integers times a unit, so that kernels multiply them as integers.

A codebook that is not here (nf4, say) has floats that only its weight's table tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class IntegerCodebook:
    """A codebook of integers: code c means integers[c] · unit.

    number: of the table in kernels/integer_binding.cpp, which has the same integers plus `zero`, as bytes.
    """

    number: int
    integers: tuple[int, ...]
    unit: float = 1.0

    @property
    def zero(self) -> int:
        """The number that makes all integers 0 or more, added to them."""
        return -min(self.integers)

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(integer * self.unit for integer in self.integers)

    def is_table(self, table: Tensor) -> bool:
        """Tell whether a weight's table, [16], has these values."""
        return tuple(table.tolist()) == self.values


def _signed(magnitudes: Iterable[int]) -> tuple[int, ...]:
    """Return up to 8 magnitudes for the codes from 0, their negatives for those from 8, and 0 for what is left."""
    half = (*magnitudes, *[0] * 8)[:8]
    return (*half, *(-magnitude for magnitude in half))


INTEGER_CODEBOOKS = {
    "e2m1": IntegerCodebook(1, _signed((0, 1, 2, 3, 4, 6, 8, 12)), 0.5),
    # Of GGUF (quantization/gguf/README.md).
    "iq4": IntegerCodebook(2, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)),
    "iq3_xxs": IntegerCodebook(3, _signed((4, 12, 20, 28, 36, 44, 52, 62))),
    "iq3_s": IntegerCodebook(4, _signed((1, 3, 5, 7, 9, 11, 13, 15))),
    "iq2": IntegerCodebook(5, _signed((8, 25, 43))),
    # -1, 0 or 1, plus an eighth; from code 8 on, minus an eighth.
    "iq1": IntegerCodebook(6, (-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7, 0, 0, 0, 0, 0), 0.125),
}
