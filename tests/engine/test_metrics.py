"""What a request's metrics say, from times and counts that are given, and that the engine counts what it does."""

from __future__ import annotations

import time

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request

from .answers import greedy


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32", progress=False)


def finished(**fields) -> Request:
    request = Request([1, 2, 3], SamplingParams(), 99)
    for name, value in {"finish_reason": "length", **fields}.items():
        setattr(request, name, value)
    return request


def test_times_and_rates_follow_from_when_things_happened():
    now = time.perf_counter()
    times = {"arrived_at": now - 8.0, "admitted_at": now - 7.0, "first_token_at": now - 5.0}
    counts = {"steps": 5, "forwards": 2, "decoded": 8, "drafted": 12, "accepted": 6, "preemptions": 1}
    request = finished(**times, **counts, last_token_at=now - 1.0, answer=list(range(9)), cached_tokens=2)
    metrics = request.output().metrics
    assert metrics.queue_seconds == pytest.approx(1.0)
    assert metrics.ttft == pytest.approx(3.0)
    assert metrics.tpot == pytest.approx(0.5)
    assert metrics.decode_tokens_per_second == pytest.approx(2.0)
    assert metrics.total_seconds == pytest.approx(7.0)
    assert metrics.tpf == 4.0 and metrics.acceptance_rate == 0.5
    assert (metrics.steps, metrics.forwards, metrics.preemptions, metrics.cached_tokens) == (5, 2, 1, 2)
    assert (metrics.prompt_tokens, metrics.answer_tokens) == (3, 9)
    # The clock on the wall, to within what passed since `now` was taken.
    assert metrics.arrived == pytest.approx(time.time() - 8.0, abs=60)
    output = request.output()
    assert (output.prefill_seconds, output.decode_seconds) == (pytest.approx(2.0), pytest.approx(4.0))


@pytest.mark.parametrize("answer", [[], [5]])
def test_what_there_is_not_is_none_and_no_time_is_negative(answer):
    now = time.perf_counter()
    times = ("arrived_at", "admitted_at", "first_token_at", "last_token_at") if answer else ("arrived_at",)
    metrics = finished(answer=answer, **dict.fromkeys(times, now)).output().metrics
    assert metrics.tpot is None and metrics.tpf is None and metrics.acceptance_rate is None
    assert metrics.decode_tokens_per_second is None
    assert (metrics.ttft is None) == (not answer)
    assert metrics.queue_seconds >= 0 and metrics.prefill_seconds >= 0 and metrics.decode_seconds == 0


def test_the_engine_counts_steps_forwards_and_preemptions(llm, monkeypatch):
    (alone,) = llm.generate([[1, 2, 3]], greedy(7))
    metrics = alone.metrics
    assert (metrics.steps, metrics.forwards, metrics.decoded_tokens, metrics.tpf) == (7, 6, 6, 1.0)
    assert metrics.answer_tokens == 7 and metrics.drafted_tokens == metrics.accepted_tokens == 0
    monkeypatch.setattr(llm.engine.scheduler, "step_tokens", 16)
    (pieces,) = llm.generate([[*range(100, 140)]], greedy(1))
    assert (pieces.metrics.steps, pieces.metrics.forwards) == (3, 0) and pieces.metrics.tpf is None
    assert pieces.metrics.prompt_tokens == 40
    monkeypatch.undo()
    monkeypatch.setattr(llm.engine, "cache", PagedKVCache(llm.model, 4, torch.device("cpu")))
    vars(llm.engine).pop("scheduler")
    try:
        outputs = llm.generate([[1, 2, 3, n] for n in range(3)], greedy(30))
        assert sum(output.metrics.preemptions for output in outputs) > 0
        assert all(
            output.metrics.queue_seconds >= 0 and output.metrics.decode_seconds > 0 for output in outputs
        )
    finally:
        monkeypatch.undo()
        vars(llm.engine).pop("scheduler")
