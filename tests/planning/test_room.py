"""The room for a KV cache on one of several GPUs: before a model is loaded, and measured after."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pymllm.api import load_model, shipped_model
from pymllm.engine import working_memory
from pymllm.engine.working_memory import largest_step, measure_step_bytes, working_bytes
from pymllm.errors import ConfigError
from pymllm.loading.prepare import prepare
from pymllm.parallel import Parallel
from pymllm.planning import room
from pymllm.planning.make_plan import make_plan, plan
from pymllm.weights import memory

from ..fake_gpus import FakeGPUs

MIB = 1 << 20


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, and a host whose memory nobody may ask for."""
    gpus = FakeGPUs(monkeypatch, 2)
    monkeypatch.setattr(memory, "_system_memory", lambda meminfo: pytest.fail("the host was asked"))
    return gpus


@pytest.mark.parametrize("index", (0, 1))
def test_a_plan_goes_by_the_free_memory_of_the_gpu_that_is_named(gpus, index):
    gpus.free = [700 * MIB, 600 * MIB]
    gpus.reserved[index], gpus.allocated[index] = 300 * MIB, 100 * MIB
    planned = plan(shipped_model(), device=f"cuda:{index}", kv_memory="1%")
    assert (planned.device, planned.device_name) == (f"cuda:{index}", f"Fake {'HA'[index]}100 number {index}")
    assert f"on cuda:{index} (Fake" in str(planned)
    free = gpus.free[index] + 200 * MIB - planned.totals["weight_bytes"]
    page = 16 * planned.totals["kv_cache_bytes_per_token"]
    assert planned.kv_cache["bytes"] == free // 100 // page * page
    assert {number for _, number in gpus.asked} == {index}


def test_a_model_that_one_gpu_cannot_hold_is_refused_with_that_gpus_numbers(gpus):
    gpus.free = [1 << 40, MIB]
    with pytest.raises(ConfigError, match=r"on cuda:1, but only 0.00 GB are free") as error:
        load_model(shipped_model(), device="cuda:1")
    assert error.value.code == "out-of-memory"


def test_memory_that_could_not_be_had_is_that_of_the_gpu_that_torch_names(gpus):
    gpus.free = [5 * 10**9, 2 * 10**9]
    said = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.9 GiB"
    error = memory.out_of_memory("a step", torch.OutOfMemoryError(said), fix="less")
    assert "on cuda:1; expected 3.00 GiB more, found 2.00 GB free" in str(error)


def test_another_machines_gpu_has_a_memory_that_nobody_knows(gpus):
    planned = plan(shipped_model(), device="cuda:sm90")
    assert memory.available_memory("cuda:sm90") is None and not gpus.asked
    assert planned.kv_cache["decided_by"] == "64 requests of the longest context"


def test_the_cache_is_measured_again_once_the_weights_are_there(gpus, monkeypatch):
    gpus.free[1] = 10**9
    prepared = prepare(shipped_model(), device="cuda:1")
    before = make_plan(prepared)
    ran = []
    monkeypatch.setattr(
        room, "measure_step_bytes", lambda model, device, tokens: ran.append((device, tokens)) or 10**7
    )
    gpus.free[1] = 900 * 10**6  # whatever else has come meanwhile
    after = room.measure_cache(before, prepared, None, "100%")
    assert ran == [(torch.device("cuda", 1), min(1024, prepared.model.max_length))]
    working = room._working(prepared, 10**7, ran[0][1], before.decoding_graph["captured"], exact=False)
    page = 16 * before.totals["kv_cache_bytes_per_token"]
    assert after.kv_cache["bytes"] == (900 * 10**6 - working) // page * page < before.kv_cache["bytes"] * 10
    assert replace(after, kv_cache=before.kv_cache) == before
    with pytest.raises(ConfigError, match="kv_memory is more than the GPU has left"):
        room.measure_cache(before, prepared, None, "899MB")


@pytest.mark.parametrize(("rows", "exact"), [("token", False), ("tensor", True)])
def test_graphs_without_spare_rows_have_their_room_in_the_plan_and_when_it_is_measured(
    gpus, monkeypatch, rows, exact
):
    asked = []
    monkeypatch.setattr(room, "working_bytes", lambda *sizes, **how: asked.append(how["exact"]) or 10**6)
    monkeypatch.setattr(room, "measure_step_bytes", lambda model, device, tokens: 10**7)
    quant = {"**": f"fp8:granularity=tensor,activations={rows}"}
    prepared = prepare(shipped_model(), quant, device="cuda:0")
    planned = make_plan(prepared)
    for unit in prepared.units:
        unit.holder.finish()
    room.measure_cache(planned, prepared, None, None)
    assert asked == [exact, exact]


def test_a_plan_says_that_a_model_cannot_be_captured_as_the_runner_does(gpus, monkeypatch):
    prepared = prepare(shipped_model(), device="cuda:0")
    assert make_plan(prepared).decoding_graph == {"captured": True, "why_not": None}
    monkeypatch.setattr(type(prepared.model), "why_not_repeated", "each request has a cache of its own")
    planned = make_plan(prepared)
    assert planned.decoding_graph == {"captured": False, "why_not": "each request has a cache of its own"}
    assert "each request has a cache of its own" in str(planned)


def test_ranks_take_the_room_of_the_one_that_has_least(gpus, monkeypatch):
    gpus.free = [8 * 10**9, 9 * 10**9]
    prepared = prepare(shipped_model(), device="cuda:1")
    monkeypatch.setattr(room, "measure_step_bytes", lambda model, device, tokens: 10**7)
    others = SimpleNamespace(exchange_json=lambda rank, value: [value, [10**9, 10**8], [9 * 10**8, 0]])
    prepared = replace(prepared, parallel=Parallel(0, 3, others))
    planned = make_plan(prepare(shipped_model(), device="cuda:1"))
    page = 16 * planned.totals["kv_cache_bytes_per_token"]
    found = room.measure_cache(planned, prepared, None, "100%").kv_cache["bytes"]
    assert found == 9 * 10**8 // page * page


def test_on_a_cpu_the_plan_stays_as_it_is():
    prepared = prepare(shipped_model(), device="cpu")
    planned = make_plan(prepared)
    assert room.measure_cache(planned, prepared, None, None) is planned


def test_the_largest_step_is_run_on_its_own_gpu_and_its_peak_is_what_it_takes(gpus, monkeypatch):
    ran = []

    class Steps:
        def __init__(self, model, device):
            self.device = device

        def hidden_states(self, texts):
            ran.append((self.device, [len(text) for text in texts], max(texts[0])))
            gpus.peak[1] = 1000 + 640
            return torch.zeros(len(texts[0]), 2)

    def compute_logits(hidden, gather_all):
        ran.append((gpus.current, len(hidden), gather_all))

    monkeypatch.setattr(working_memory, "Runner", Steps)
    model = SimpleNamespace(config=SimpleNamespace(size=lambda name: 50), compute_logits=compute_logits)
    gpus.allocated = [7, 1000]
    assert measure_step_bytes(model, torch.device("cuda", 1), 100) == 640
    assert ran == [(torch.device("cuda", 1), [100], 49), (1, 64, True)] and gpus.current == 0
    assert {number for _, number in gpus.asked} == {1}

    def fails(hidden, gather_all):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total")

    model.compute_logits = fails
    with pytest.raises(ConfigError, match="a first step of 100 tokens has run out of memory on cuda:1"):
        measure_step_bytes(model, torch.device("cuda", 1), 100)


def test_what_has_to_stay_free_grows_with_what_is_captured_and_with_the_vocabulary():
    eager = working_bytes(1000, 10, 50, captured=False)
    assert eager == 1000 + 64 * 50 * 64
    # 199 rows of nine graphs.
    assert working_bytes(1000, 10, 50, captured=True) == eager + 199 * (100 + 50 * 8) + 9 * (32 << 20)
    # 64 graphs, of 1 to 64 rows, where there are no spare ones.
    exact = working_bytes(1000, 10, 50, captured=True, exact=True)
    assert exact == eager + 2080 * (100 + 50 * 8) + 64 * (32 << 20)
    assert working_bytes(1000, 10, 50, captured=False, widths=(4,)) == 1000 + 4 * 64 * 50 * 64
    drafting = working_bytes(1000, 10, 50, captured=True, widths=(1, 4))
    assert drafting == 1000 + 4 * 64 * 50 * 64 + 5 * 199 * (100 + 50 * 8) + 2 * 9 * (32 << 20)


def test_a_plan_leaves_room_for_steps_with_drafts(gpus, monkeypatch):
    asked = []
    monkeypatch.setattr(room, "working_bytes", lambda *sizes, **how: asked.append(how["widths"]) or 10**6)
    for strategy in (None, "prompt_lookup:drafts=5", "block_diffusion:block_length=4,mask_token_id=3"):
        plan(shipped_model(), device="cuda:0", strategy=strategy)
    assert asked == [(1,), (1, 6), (4,)]


@pytest.mark.parametrize(
    ("whole", "asked", "tokens"),
    [(False, None, 1024), (False, 100, 100), (False, 5000, 1024), (True, None, 1024), (True, 5000, 5000)],
)
def test_the_largest_step_is_a_piece_of_a_prompt_or_all_of_it(whole, asked, tokens):
    model = SimpleNamespace(keys_depend_on_length=whole, max_length=8192)
    assert largest_step(model, asked) == tokens
