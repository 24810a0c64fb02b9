"""Searching for tiles: what a GPU is too small for, what is wrong, what crashes, and what there is no time for."""

import math
from pathlib import Path

import pytest
import torch

from pymllm.errors import KernelError
from pymllm.kernels.triton import weight_only
from pymllm.kernels.triton.int_weights import TritonInt, int_coding
from pymllm.kernels.triton.tune import candidates, tune
from pymllm.kernels.triton.tuning import Tile

from ...processes import python
from .gpu import DEVICE, HERE

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

INT4 = int_coding("4", "128", "2", "128")
DEFAULT = weight_only.default_tile(DEVICE, 4, 64, 16, INT4)
SMALL, LARGE, OTHER = (Tile(o, 16, 16, warps=4, stages=1) for o in (32, 64, 128))
REFUSALS = {
    "out of shared memory": OutOfResources(2, 1, "shared memory"),
    "out of threads": OutOfResources(2, 1, "threads"),
    "not compiled": PTXASError("too many registers"),
    "not launched": RuntimeError("Triton Error [CUDA]: invalid argument"),
}


class Faulty(TritonInt):
    """A kernel whose tiles do as they are told: they raise, or are off by a factor."""

    def __init__(self, faults):
        self.faults = faults

    def run(self, packed, problem, x, bias):
        fault = self.faults.get(weight_only._forced.get())
        if isinstance(fault, BaseException):
            raise fault
        weight = self.unpack(packed, problem).dequantize(torch.float32)
        return ((x.float() @ weight.t()) * (1.0 if fault is None else fault)).to(x.dtype)


def search(faults, tiles, clock=lambda calls: 1.0, **settings):
    kept = []
    found = tune(
        Faulty(faults),
        TritonInt().examples()[1],
        64,
        128,
        3,
        DEVICE,
        where=HERE,
        clock=clock,
        keep=lambda key, tile: kept.append(tile),
        tiles=lambda tokens, default: iter((default, *tiles)),
        **settings,
    )
    return found, kept


@pytest.mark.parametrize("reason", REFUSALS)
@pytest.mark.parametrize("refused", (DEFAULT, SMALL), ids=("by rule", "another"))
def test_a_tile_that_the_gpu_refuses_is_counted_and_the_others_are_timed(reason, refused):
    found, kept = search({refused: REFUSALS[reason]}, [SMALL, LARGE])
    assert found.skipped == {reason: 1}
    assert list(found.seconds) == [tile for tile in (DEFAULT, SMALL, LARGE) if tile != refused]
    assert f"1 {reason}" in str(found)
    assert ("not to be built here" in str(found)) == (refused == DEFAULT)
    assert (SMALL in kept) == (refused == DEFAULT), "as fast as the default one is not faster"


def test_a_source_that_does_not_compile_is_counted():
    found, _ = search({SMALL: CompilationError("src", None, "no")}, [SMALL])
    assert found.skipped == {"not compiled": 1}


def test_tiles_beyond_a_block_s_shared_memory_are_not_compiled():
    vast = Tile(4096, 64, 64, warps=8, stages=3)
    found, _ = search({vast: AssertionError("was run")}, [vast])
    assert found.skipped == {"too large for a block's shared memory": 1}


@pytest.mark.parametrize("factor", (1.5, 0.0, math.nan, math.inf))
def test_a_wrong_result_is_told_with_its_tile_and_never_chosen(factor):
    found, kept = search({SMALL: factor}, [SMALL, LARGE], clock=_falling())
    assert found.best == LARGE and kept == [LARGE]
    assert len(found.wrong) == 1 and str(SMALL) in found.wrong[0]


def _falling():
    times = iter(range(9, 0, -1))
    return lambda calls: float(next(times))


@pytest.mark.parametrize(
    "error", (RuntimeError("CUDA error: an illegal memory access"), TypeError("a bug"), IndexError("2"))
)
def test_a_crash_ends_the_search_with_the_name_of_its_tile_and_leaves_what_was_found(error):
    kept = []
    with pytest.raises(KernelError, match="outputs=128") as caught:
        tune(
            Faulty({OTHER: error}),
            TritonInt().examples()[1],
            64,
            128,
            3,
            DEVICE,
            where=HERE,
            clock=_falling(),
            keep=lambda key, tile: kept.append(tile),
            tiles=lambda tokens, default: iter((default, SMALL, OTHER)),
        )
    assert str(error) in str(caught.value) and kept == [SMALL]


def test_no_tile_that_works_is_one_error_that_says_why():
    with pytest.raises(KernelError, match="no tile of weight_only t4") as caught:
        search({DEFAULT: REFUSALS["out of threads"], SMALL: PTXASError("x"), LARGE: 2.0}, [SMALL, LARGE])
    for why in ("1 out of threads", "1 not compiled", "outputs=64"):
        assert why in str(caught.value)


def test_at_the_deadline_the_rest_is_left_out_but_one_tile_is_always_tried():
    hours = iter(range(9))
    found, _ = search(
        {DEFAULT: PTXASError("x")}, [SMALL, LARGE, OTHER], deadline=0.5, now=lambda: next(hours)
    )
    assert list(found.seconds) == [SMALL, LARGE]
    assert found.skipped["left out, as the time was up"] == 1


def test_no_more_tiles_are_tried_than_the_limit():
    assert len(search({}, [SMALL, LARGE, OTHER], limit=2)[0].seconds) == 2


@pytest.mark.parametrize("tokens", (1, 16, 64))
def test_the_tile_by_rule_comes_first_and_then_those_like_it(tokens):
    default = weight_only.default_tile(DEVICE, tokens, 4096, 512, INT4)
    found = list(dict.fromkeys(candidates(tokens, default)))
    assert found[0] == default and len(found) > 100

    def changed(tile):
        return sum(a != b for a, b in zip(vars(tile).values(), vars(default).values(), strict=True))

    assert all(changed(tile) <= 2 for tile in found[:8]) and changed(found[-1]) >= 3


def test_on_a_gpu_with_less_shared_memory_the_other_tiles_are_found():
    """In a process that compiles."""
    file = Path(__file__).with_name("compiled_tuning.py")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
