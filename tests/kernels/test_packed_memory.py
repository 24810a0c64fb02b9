"""Packed weights share mappings without sharing a byte, and give them back."""

import gc
import weakref

import pytest
import torch

from pymllm.kernels import packed_memory
from pymllm.kernels.packed_memory import ALIGNMENT, MAPPING, SMALL, empty_packed


@pytest.fixture(autouse=True)
def fresh_mapping(monkeypatch):
    monkeypatch.setattr(packed_memory, "_rest", None)


def test_weights_lie_aligned_and_apart():
    shapes = [(3, 5, SMALL), (1, SMALL + 1), (7, 11, 1000 + SMALL), (2, 3), (0, 4), (1, MAPPING), (2, SMALL)]
    tensors = [empty_packed(shape) for shape in shapes]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype is torch.uint8 and tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_a_mapping_goes_with_its_last_weight(monkeypatch):
    mapped = []
    original = packed_memory.mmap.mmap

    class Mapping(original):
        def __new__(cls, *given, **settings):
            memory = original.__new__(cls, *given, **settings)
            mapped.append(weakref.ref(memory))
            return memory

    monkeypatch.setattr(packed_memory.mmap, "mmap", Mapping)
    first, second = empty_packed((2, SMALL)), empty_packed((2, SMALL))
    if not mapped:
        pytest.skip("this system has no huge pages to ask for")
    assert len(mapped) == 1
    packed_memory._rest = None
    second.fill_(2)
    del first
    gc.collect()
    assert mapped[0]() is not None and bool((second == 2).all())
    del second
    gc.collect()
    assert mapped[0]() is None
