"""Captured steps whose requests have adapters: every row is marked with its own."""

from __future__ import annotations

import pytest

from pymllm import LLM, SamplingParams
from pymllm.engine.graphs import why_not_captured

from ..adapters.handwritten import random_adapter
from ..checkpoints import write_checkpoint
from .emulated_gpu import captured, emulated_gpu, settle  # noqa: F401
from .test_graphs import with_graphs

PROMPTS = [[5, 6, 7], [9] * 20, [11, 3, 20], [5, 6, 7], [5, 6, 7]]
TARGETS = {"a": ("q_proj", "v_proj", "down_proj"), "b": ("gate_proj", "o_proj"), "c": ("q_proj", "lm_head")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    made = write_checkpoint(folder / "model")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        random_adapter(folder / name, made, targets, rank=2 + seed, seed=seed)
    return folder


def load(folder, names="ab", **options):
    return LLM(folder / "model", adapters={name: folder / name for name in names}, **options)


def answers(llm, adapters, prompts=PROMPTS, count=10):
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    asked = prompts[: len(adapters)]
    return [output.token_ids for output in llm.generate(asked, params, adapter=list(adapters))]


MIXES = (("a", "b", None, "b", None), ("b", None, "a"), ("a", "a"), (None, None, "b", "a", "a"))


def test_any_mix_of_adapters_is_replayed_from_one_capture_of_its_bucket(checkpoint):
    eager, captures = load(checkpoint, dtype="float32"), []
    llm = with_graphs(settle(load(checkpoint, dtype="float32")), captures)
    expected = [answers(eager, mix) for mix in MIXES]
    assert len({tuple(found[0]) for found in expected}) > 1, "adapters change answers"
    assert [answers(llm, mix) for mix in MIXES] == expected
    assert captures == [8, 4, 2]
    # Without adapters a step has none of their products.
    assert answers(llm, [None] * 2) == answers(eager, [None] * 2) and captures == [8, 4, 2, 2]
    assert all(batch.replay is not None for batch in llm.engine.runner._decoding.values())


def test_another_set_of_adapters_is_captured_anew(checkpoint):
    captures = []
    llm = with_graphs(settle(load(checkpoint, "a", dtype="float32")), captures)
    assert answers(llm, "aa") == answers(load(checkpoint, dtype="float32"), "aa") and captures == [2]
    llm.load_adapter("c", checkpoint / "c")
    llm.load_adapter("b", checkpoint / "b")
    everything = load(checkpoint, "abc", dtype="float32")
    assert answers(llm, "abc") == answers(everything, "abc") and captures == [2, 4]
    assert answers(llm, "cba") == answers(everything, "cba") and captures == [2, 4]
    llm.unload_adapter("b")
    assert answers(llm, "ca") == answers(everything, "ca") and captures == [2, 4, 2]


def test_requests_without_an_adapter_have_the_active_one_in_a_captured_step_too(checkpoint):
    eager, llm = load(checkpoint, dtype="float32"), with_graphs(load(checkpoint, dtype="float32"), [])
    for each in (eager, llm):
        for module in each.model.modules():
            if "a" in getattr(module, "adapters", ()):
                module.active_adapter = "a"
    mix = (None, "b", None)
    assert answers(llm, mix) == answers(eager, mix)
    assert answers(llm, (None,)) == answers(llm, ("a",))


def test_a_step_with_adapters_that_is_captured_looks_at_no_host(checkpoint, emulated_gpu):  # noqa: F811
    llm = settle(load(checkpoint, "abc", dtype="bfloat16"))
    assert why_not_captured(llm.model) is None
    runner = llm.engine.runner
    runner.capture = captured
    answers(llm, ("a", None, "c"), [[5], [9, 8], [1]], 2)
    assert runner.why_eager is None
    assert [batch.replay is not None for batch in runner._decoding.values()] == [True]


def test_on_a_cpu_a_step_with_adapters_has_no_tape(checkpoint):
    llm = load(checkpoint, dtype="float32")
    answers(llm, ("a", "b"))
    assert not llm.engine.runner._decoding
