"""Codes in 32-bit words, in an order that a kernel expands without a shuffle.

A span of inputs becomes span / per_word words: code n of word j is input n * (span / per_word) + j. Shifting a whole
tile of words by n codes thus gives a tile of inputs that lie side by side, ready to be multiplied.
"""

# O out_features, I in_features, W words a row (I / per_word), S spans a row

from __future__ import annotations

import torch
from torch import Tensor

SPANS = (128, 64, 32, 16)


def span_of(group_size: int) -> int | None:
    """Find the longest span within one group, so that a word has one scale; None: there is none."""
    return next((span for span in SPANS if group_size % span == 0), None)


def pack_words(codes: Tensor, bits: int, span: int) -> Tensor:
    """Pack uint8 codes below 2**bits, [..., O, I], into int32 words, [..., O, W].  bits: 2, 4 or 8; span divides I."""
    per_word = 32 // bits
    runs = codes.unflatten(-1, (-1, per_word, span // per_word))  # [..., O, S, per_word, words of a span]
    words = runs[..., 0, :].int()
    for n in range(1, per_word):
        words |= runs[..., n, :].int() << (bits * n)
    return words.flatten(-2)


def unpack_words(words: Tensor, bits: int, span: int) -> Tensor:
    """Unpack what `pack_words` packed: int32 words, [..., O, W], into uint8 codes, [..., O, I]."""
    per_word = 32 // bits
    runs = words.unflatten(-1, (-1, span // per_word))  # [..., O, S, words of a span]
    codes = torch.empty((*runs.shape[:-1], per_word, runs.shape[-1]), dtype=torch.uint8, device=words.device)
    for n in range(per_word):
        codes[..., n, :] = (runs >> (bits * n)) & (2**bits - 1)
    return codes.flatten(-3)
