"""Codes in 32-bit words, in the order in which the threads of a matrix unit hold its left operand.

Four threads hold a row of that operand: each takes one of four words, and the same word of every run of the span. Code
`half * N/2 + n` of a word lies in its low or its high half, at the same place: so one instruction decodes both, into
two neighbouring inputs. With word `c` of the four, of run `r`:

    input = r * C * N + high * C * beside + c * beside + low * 2 + half,    n = high * beside / 2 + low
    place in the span = c * runs + r
"""

# O out_features, I in_features, N codes a word, W words a row (I / N), S spans a row, C words across threads

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.hardware import Architecture

SPANS = (128, 64, 32, 16)


@dataclass(frozen=True)
class Order:
    """The order of a row's codes.  span: inputs whose words lie together.  beside: neighbours that a word holds."""

    span: int
    beside: int


def order_for(in_features: int, architecture: Architecture | None) -> Order:
    """Return the order that the matrix units of this architecture take.  in_features: a multiple of 16."""
    span = span_of(in_features)
    assert span is not None
    # Hopper's units, and those of the large Blackwells, take pairs. For the others, Triton has a thread hold four.
    pairs = architecture is not None and architecture.is_nvidia and architecture.capability[0] in (9, 10)
    return Order(span, 2 if pairs else 4)


def span_of(length: int) -> int | None:
    """Find the longest span that divides this length; None: there is none."""
    return next((span for span in SPANS if length % span == 0), None)


def words_across(per_word: int, span: int) -> int:
    """Return how many words of a run different threads take."""
    return min(4, span // per_word)


def pack_words(codes: Tensor, bits: int, order: Order) -> Tensor:
    """Pack uint8 codes below 2**bits, [..., O, I], into int32 words, [..., O, W].

    bits: 2, 4 or 8.  The order's span divides I.
    """
    runs = _in_runs(codes, bits, order)  # [..., O, S, runs, high, C, low, half]
    words = torch.zeros((), dtype=torch.int32, device=codes.device)
    for code, (half, high, low) in enumerate(_places(bits, order.beside)):
        words = words | (runs[..., high, :, low, half].int() << (bits * code))  # [..., O, S, runs, C]
    return words.transpose(-1, -2).flatten(-3)


def unpack_words(words: Tensor, bits: int, order: Order) -> Tensor:
    """Unpack what `pack_words` packed: int32 words, [..., O, W], into uint8 codes, [..., O, I]."""
    per_word = 32 // bits
    across = words_across(per_word, order.span)
    parts = words.unflatten(-1, (-1, across, order.span // per_word // across)).transpose(-1, -2)
    codes = torch.empty(
        (*words.shape[:-1], words.shape[-1] * per_word), dtype=torch.uint8, device=words.device
    )
    runs = _in_runs(codes, bits, order)
    for code, (half, high, low) in enumerate(_places(bits, order.beside)):
        runs[..., high, :, low, half] = (parts >> (bits * code)) & (2**bits - 1)
    return codes


def _in_runs(codes: Tensor, bits: int, order: Order) -> Tensor:
    per_word = 32 // bits
    across, beside = words_across(per_word, order.span), order.beside
    runs = order.span // per_word // across
    return codes.unflatten(-1, (-1, runs, per_word // beside, across, beside // 2, 2))


def _places(bits: int, beside: int) -> list[tuple[int, int, int]]:
    """Return (half, high, low) of each code of a word, in the order of its bits."""
    half = 32 // bits // 2
    return [(code // half, code % half // (beside // 2), code % (beside // 2)) for code in range(2 * half)]
