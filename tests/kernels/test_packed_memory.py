"""Memory of packed weights: theirs alone, and given back with them."""

import gc
import weakref

import pytest
import torch

from pymllm.kernels.native import packed_memory
from pymllm.kernels.native.packed_memory import HUGE_PAGE, empty_packed


def test_weights_lie_aligned_and_apart():
    shapes = [(3, 5, 7), (0, 4), (1, HUGE_PAGE - 1), (1, HUGE_PAGE), (7, 11, 100_003), (2, HUGE_PAGE)]
    tensors = [empty_packed(shape) for shape in shapes]
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype is torch.uint8 and tensor.is_contiguous()
        assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_a_mapping_goes_with_the_last_view_of_its_weight(monkeypatch):
    mapped = []
    original = packed_memory.mmap.mmap

    class Mapping(original):
        def __new__(cls, *given, **settings):
            memory = original.__new__(cls, *given, **settings)
            mapped.append(weakref.ref(memory))
            return memory

    monkeypatch.setattr(packed_memory.mmap, "mmap", Mapping)
    weight = empty_packed((2, HUGE_PAGE))
    if not mapped:
        pytest.skip("this system has no huge pages to ask for")
    view = weight[1]
    view.fill_(2)
    del weight
    gc.collect()
    assert mapped[0]() is not None and bool((view == 2).all())
    del view
    gc.collect()
    assert mapped[0]() is None
