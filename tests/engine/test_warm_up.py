"""What is compiled before the first request is what the steps of requests launch."""

# R requests

import logging
import random

import pytest

from pymllm import LLM
from pymllm.api import shipped_model, warming
from pymllm.engine.graphs import bucket_of
from pymllm.engine.warm_up import StepsWithoutData, launches_of_steps, sizes
from pymllm.kernels.triton.ahead_of_time import binary_key
from pymllm.kernels.triton.launch import recording
from pymllm.loading.prepare import prepare
from tests.models.test_hybrid import write as write_hybrid
from tests.moe_checkpoints import write_moe

MAX_LENGTH, PAGES, SLOTS = 4096, 512, 64
KINDS = {
    "int4": (None, {"quant": "**=int4"}),
    "fp8": (None, {"quant": "**=fp8"}),
    "mxfp4, fp8 keys": (None, {"quant": {"**.mlp.**": "mxfp4"}, "kv_cache": "fp8"}),
    "floats, eager": (None, {"kernels": {"attention": "triton"}}),
    "experts": (lambda folder: write_moe(folder, "qwen3_moe"), {}),
    "experts of int4": (lambda folder: write_moe(folder, "mixtral"), {"quant": "**=int4"}),
    "states": (lambda folder: write_hybrid(folder, "qwen3_next"), {}),
}


@pytest.fixture(params=KINDS, scope="module")
def twin(request, tmp_path_factory):
    """A model for a GPU that is not here, without data."""
    write, options = KINDS[request.param]
    folder = shipped_model() if write is None else tmp_path_factory.mktemp("model") / "m"
    if write is not None:
        write(folder)
    return ready(folder, options)


def ready(folder, options):
    prepared = prepare(folder, device="cuda:sm90", dtype="bfloat16", **options)
    for unit in prepared.units:
        unit.holder.finish()
    return prepared.model


def test_no_later_step_needs_a_kernel_that_the_warm_up_has_not_compiled(twin):
    built = {binary_key(launch) for launch in launches_of_steps(twin, MAX_LENGTH, PAGES, SLOTS)}
    assert built
    steps, draw = StepsWithoutData(twin, MAX_LENGTH, PAGES, SLOTS), random.Random(5)
    with recording() as launches:
        for requests in range(1, 65):
            steps.decode(bucket_of(requests), steps.widths[-1])
        for tokens in (*range(2, 40), 127, 128, 129, 255, 257, 777, 1000, 1025, 2047, 3333, 4095):
            steps.run((tokens, min(tokens + draw.randrange(99), MAX_LENGTH)))
        for _ in range(20):
            news = [draw.choice((1, 1, 1, 3, 17, 200)) for _ in range(draw.randrange(2, 12))]
            steps.run((5, 5), *((new, new + draw.randrange(1000)) for new in news))
    missing = {key for key in map(binary_key, launches) if key not in built}
    assert missing == set()


def test_steps_that_are_not_captured_are_compiled_for_every_length_of_the_keys(twin, monkeypatch):
    monkeypatch.setattr("pymllm.engine.warm_up.why_not_captured", lambda model: "it has hooks")
    built = {binary_key(launch) for launch in launches_of_steps(twin, MAX_LENGTH, PAGES, SLOTS)}
    steps, draw = StepsWithoutData(twin, MAX_LENGTH, PAGES, SLOTS), random.Random(9)
    with recording() as launches:
        for _ in range(60):
            steps.run(*[(1, draw.randrange(2, MAX_LENGTH))] * draw.randrange(1, 65))
    assert {key for key in map(binary_key, launches) if key not in built} == set()


@pytest.mark.parametrize(
    "strategy", ("prompt_lookup:drafts=5", f"draft_model:path={shipped_model()},drafts=5")
)
def test_steps_with_drafts_are_compiled_too_without_what_drafts(strategy):
    """After each draft a token may be chosen: steps of 64 requests have 384 tokens."""

    def of(**options):
        return launches_of_steps(
            ready(shipped_model(), {"quant": "**=int4", **options}), MAX_LENGTH, PAGES, SLOTS
        )

    plain, found = ({binary_key(launch) for launch in launches} for launches in (of(), of(strategy=strategy)))
    assert plain and plain <= found
    steps = StepsWithoutData(
        ready(shipped_model(), {"quant": "**=int4", "strategy": strategy}), MAX_LENGTH, PAGES, SLOTS
    )
    assert steps.widths == (1, 6)
    with recording() as launches:
        for requests in (1, 3, 20, 64):
            steps.decode(bucket_of(requests), 6)
    assert {binary_key(launch) for launch in launches} <= found


@pytest.mark.parametrize("longest", (1, 2, 15, 16, 17, 24, 100, 8192))
def test_sizes_reach_the_longest_and_no_further(longest):
    found = list(sizes(longest))
    assert found == sorted(set(found)) and all(2 <= size <= longest for size in found)
    assert longest < 2 or max(found) > longest / 2


def test_on_a_cpu_nothing_is_compiled_and_a_gpu_that_is_off_compiles_nothing(monkeypatch):
    def compile_kernels(*arguments):
        raise AssertionError("was called")

    monkeypatch.setattr("pymllm.api.llm.compile_kernels", compile_kernels)
    assert LLM(device="cpu", progress=False).prepared.execution.device == "cpu"
    monkeypatch.setattr("pymllm.api.llm.why_not_warmed", lambda prepared: None)
    LLM(device="cpu", progress=False, warm_up=False)
    with pytest.raises(AssertionError, match="was called"):
        LLM(device="cpu", progress=False)


def test_what_is_compiled_is_what_the_plan_s_cache_allows(llm, monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(
        warming, "compile_launches", lambda launches, advance: compiled.extend(launches) or advance(1) or 2
    )
    with caplog.at_level(logging.INFO, logger="pymllm"):
        count = warming.compile_kernels(
            lambda: prepare(shipped_model(), "**=int4", device="cuda:sm90", dtype="bfloat16"), llm.plan
        )
    assert count == len(compiled) == len({binary_key(launch) for launch in compiled})
    assert f"compiling {count} kernels" in caplog.text and f"2 of {count} kernels were not" in caplog.text


def test_a_model_that_cannot_go_without_data_is_told_of_and_starts(llm, caplog):
    def fails():
        raise NotImplementedError("asks for data")

    assert warming.compile_kernels(fails, llm.plan) == 0
    assert "kernels are compiled when first launched: NotImplementedError: asks for data" in caplog.text
