"""Packing that several formats share: little fields in big words, and the tables of 4-bit floats."""

# N rows, K columns

from __future__ import annotations

import torch
from torch import Tensor

# Values of the 4-bit codes 0..15; codes from 8 on are the negatives of those from 0.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_fields(words: Tensor, bits: int) -> Tensor:
    """[N, K·bits/32] int32 words → [N, K] uint8 fields, the lowest bits of a word first.  bits: 2, 4 or 8.

    Works on bytes, so that no temporary is larger than the result.
    """
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    fields = torch.empty((*octets.shape, 8 // bits), dtype=torch.uint8, device=octets.device)
    for index in range(8 // bits):
        fields[..., index] = (octets >> (bits * index)) & (2**bits - 1)
    return fields.flatten(-2)


def unpack_nibbles_low_first(packed: Tensor) -> Tensor:
    """[N, K/2] bytes → [N, K] uint8 codes, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
