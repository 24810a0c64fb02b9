"""Tuning with compiled kernels, for a GPU of less shared memory, through a driver that launches nothing.

`test_tune.py` runs this file in a process of its own: there the kernels are compiled, not interpreted.
"""

from __future__ import annotations

import pytest
import torch

from pymllm.kernels.hardware import ARCHITECTURES, probe_device
from pymllm.kernels.triton import weight_only
from pymllm.kernels.triton.int_weights import TritonInt
from pymllm.kernels.triton.launch import interpreting
from pymllm.kernels.triton.tune import tune
from pymllm.kernels.triton.tuning import Tile

from .fake_driver import fake_driver

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels are compiled in a process of their own")


class Answered(TritonInt):
    """A kernel that is launched, and whose result is then made by torch, as nothing really runs."""

    def run(self, packed, problem, x, bias):
        super().run(packed, problem, x, bias)
        weight = self.unpack(packed, problem).dequantize(torch.float32)
        return (x.float() @ weight.t()).to(x.dtype)


def test_a_tile_of_more_shared_memory_than_the_gpu_has_is_skipped_and_one_of_too_many_threads():
    tiles = [Tile(64, 16, 16, warps=4, stages=1), Tile(128, 64, 32, warps=4, stages=3)]
    tiles.append(Tile(64, 16, 16, warps=8, stages=1))
    with fake_driver("cuda", 86, ARCHITECTURES["sm86"].shared_bytes // 2) as driver:
        found = tune(
            Answered(),
            TritonInt().examples()[1],
            256,
            512,
            64,
            probe_device("cuda:sm86"),
            where=torch.device("cpu"),
            clock=lambda calls: driver.utils.__setattr__("threads", 128) or 1.0,
            keep=lambda key, tile: None,
            tiles=lambda tokens, default: iter(tiles),
        )
    assert list(found.seconds) == tiles[:1]
    assert found.skipped == {"out of shared memory": 1, "out of threads": 1}
    assert weight_only._forced.get() is None
    assert {launched.function.split()[0] for launched in driver.launches} == {"multiply_tile"}
