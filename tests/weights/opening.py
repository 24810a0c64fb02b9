"""Tensors to write, and opening files: what tests of the reader share."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pymllm.errors import CheckpointError
from pymllm.weights.safetensors_file import SafetensorsFile


def random_tensor(shape, dtype, seed=0):
    """Every bit random, NaNs included: a reader moves bytes."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=generator)
    return raw.reshape(-1).view(dtype).reshape(shape)


def same_bytes(actual, expected):
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected)]
    return torch.equal(*flat)


def write(path: Path, tensors) -> SafetensorsFile:
    save_file(tensors, path, metadata={"format": "pt"})
    return SafetensorsFile.open(path)


def error_of(open_it, path: Path) -> CheckpointError:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_it(path)
        # The largest fault is a header of a million characters, so no claim of a file became an allocation.
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    return caught.value
