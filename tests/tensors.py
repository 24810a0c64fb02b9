"""Random tensors: the same for the same seed, on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0) -> Tensor:
    """Draw float32 numbers of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1, scale: float = 1.0) -> Tensor:
    """Draw numbers of a normal distribution of this scale, rounded to dtype."""
    return (random(*shape, seed=seed) * scale).to(dtype)
