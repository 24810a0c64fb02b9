"""Reading ahead, scratch memory and slabs: the same packed bytes, the first error in order, no thread left."""

from __future__ import annotations

import threading

import pytest
import torch

from pymllm.api import load_model
from pymllm.errors import CheckpointError
from pymllm.loading import load, reading, scratch
from pymllm.loading.scratch import Scratch
from pymllm.quantization import slabs
from pymllm.quantization.binding import bound_weight
from pymllm.weights.tensor_file import TensorInfo

from ..checkpoints import AWQ, FP8, Plain, write_checkpoint
from ..kernels.integer_cases import needs_native

GATE = "model.layers.0.mlp.gate_proj.qweight"
UP = "model.layers.0.mlp.up_proj.qweight"


@pytest.fixture
def large(monkeypatch, torch_threads):
    """Everything counts as large: two threads read pieces of 1 KiB, slabs have 16 outputs, all memory is scratch."""
    torch_threads(2)
    monkeypatch.setattr(reading, "WORTH_A_THREAD", 0)
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(scratch, "LEAST", 1)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1)


def packed_of(folder, **options):
    model = load_model(folder, device="cpu", progress=False, **options)
    bound = {name: bound_weight(module) for name, module in model.named_modules()}
    found = {
        f"{name}.{key}": tensor.contiguous().view(torch.uint8)
        for name, weight in bound.items()
        if weight is not None
        for key, tensor in weight.packed.items()
    }
    plain = {name: p.detach().contiguous().view(torch.uint8) for name, p in model.named_parameters()}
    return found | plain


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pymllm-reads")]


RULES = {
    "stored": None,
    "int8": {"**.mlp.**": "int8"},
    "mse": {"**.layers.**": "int4:scale=mse,group_size=32"},
    "hqq": {"**.layers.**": "int4:scale=hqq,group_size=32"},
    "awq": {"**.layers.**": "awq:group_size=32"},
    "gptq": {"**.layers.**": "gptq:group_size=32"},
}


CASES = {
    **{f"plain-{name}": (Plain(), name) for name in RULES},
    **{f"awq-{name}": (AWQ(32), name) for name in ("stored", "int8")},
    **{f"fp8-{name}": (FP8(), name) for name in ("stored", "int8")},
}


@pytest.mark.parametrize("case", CASES)
def test_large_weights_are_packed_as_small_ones(tmp_path, monkeypatch, request, case):
    writer, rules = CASES[case][0], RULES[CASES[case][1]]
    folder = write_checkpoint(tmp_path, "llama", writer).folder
    expected = packed_of(folder, quant=rules)
    request.getfixturevalue("large")
    found = packed_of(folder, quant=rules)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not readers()


@needs_native
def test_slabs_are_what_packs_large_integers(good, large, monkeypatch, tmp_path):
    sizes = []
    real = slabs.NativeIntegerLinear.pack

    def recording(self, weight, problem, blocks=None):
        if not weight.codes.is_meta:  # which a plan packs
            sizes.append(None if blocks is None else problem.out_features)
        return real(self, weight, problem, blocks)

    monkeypatch.setattr(slabs.NativeIntegerLinear, "pack", recording)
    packed_of(good.folder)
    assert set(sizes) == {16}
    # Also where they are quantised while they load: nothing of a whole weight's size is made of its floats.
    sizes.clear()
    packed_of(write_checkpoint(tmp_path, "llama", Plain()).folder, quant={"**.layers.**": "int8"})
    assert set(sizes) == {16}


def failing(monkeypatch, faults):
    """Reads of the tensors named fail."""
    real = TensorInfo.read

    def read(self, *args, **options):
        if self.name in faults:
            raise faults[self.name]
        return real(self, *args, **options)

    monkeypatch.setattr(TensorInfo, "read", read)


def test_the_first_error_in_order_comes_out_whoever_meets_it(good, large, monkeypatch):
    faults = {
        name: CheckpointError(f"no {name}", code="unreadable", tensor=name)
        for name in (UP, GATE, "model.layers.0.mlp.down_proj.qweight", "lm_head.weight")
    }
    failing(monkeypatch, faults)
    with pytest.raises(CheckpointError, match=f"no {GATE}") as caught:
        packed_of(good.folder)
    assert caught.value.tensor == GATE and not readers()


def test_a_bad_value_comes_before_a_later_tensor_that_cannot_be_read(good, large, monkeypatch):
    failing(monkeypatch, {UP: CheckpointError("unreadable", code="unreadable", tensor=UP)})
    real = load.check_placed

    def check(placement, target, shape):
        if placement.tensor.name == GATE:
            raise CheckpointError("bad", code="bad-value", tensor=GATE)
        return real(placement, target, shape)

    monkeypatch.setattr(load, "check_placed", check)
    with pytest.raises(CheckpointError) as caught:
        packed_of(good.folder)
    assert caught.value.code == "bad-value" and not readers()


def test_an_interruption_leaves_no_thread(good, large, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("pymllm.layers.weighted.WeightedLayer.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed_of(good.folder)
    assert not readers()


def test_what_cannot_be_read_ahead_is_read_in_its_turn(good, large, monkeypatch):
    expected = packed_of(good.folder)
    real, calls = reading.Reader._start, []

    def start(self, unit):
        calls.append(unit.name)
        if calls.count(unit.name) == 1 and len(calls) > 1:
            raise MemoryError
        return real(self, unit)

    monkeypatch.setattr(reading.Reader, "_start", start)
    found = packed_of(good.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(calls) == 2 * len(set(calls)) - 1, "all but the first are begun twice"


def test_scratch_is_used_again_only_when_nothing_holds_it():
    memory = Scratch()
    memory.begin(3000, 2)
    first, second = memory.take((10, 100), torch.uint8), memory.take((500,), torch.float16)
    at = first.data_ptr()
    first.fill_(1), second.fill_(2)
    assert bool((first == 1).all()) and second.data_ptr() % 64 == 0
    row = first[3].view(2, 50)
    del first, second
    memory.begin(3000, 2)
    memory.take((3000,), torch.uint8).fill_(9)
    assert bool((row == 1).all()), "a view is enough to keep it"
    at = memory.take((1,), torch.uint8).data_ptr()
    memory.begin(3000, 2)
    memory.take((3000,), torch.uint8)
    assert memory.take((1,), torch.uint8).data_ptr() == at, "else the same pages serve"
