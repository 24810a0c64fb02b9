"""Decoding over captured steps: everything but the capture itself, which needs a GPU (see the last test)."""

from __future__ import annotations

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.api import shipped_model
from pymllm.engine.decoding import DecodingBatch
from pymllm.engine.graphs import BUCKETS, bucket_of, why_not_captured
from pymllm.engine.request import Request
from pymllm.planning.make_plan import plan

from ..moe_checkpoints import write_moe

PROMPTS = [[5, 6, 7], [9] * 30, [11, 3, 200, 17, 8]]


def answers(llm, prompts, count=24):
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [output.token_ids for output in llm.generate(prompts, params)]


def played_back(run):
    """Stand for a CUDA graph: run the same step again, and leave its result where the first one was."""
    logits = run().clone()
    return lambda: logits.copy_(run())


def with_graphs(llm, captures):
    """Let `llm` decode through graphs that are played in Python; note the rows of each capture."""

    def capture(run):
        replay = played_back(run)
        captures.append(len(replay()))
        return replay

    llm.engine.runner.capture = capture
    return llm


def test_answers_in_padded_buckets_are_those_without():
    expected = answers(LLM(dtype="float32"), PROMPTS)
    captures = []
    llm = with_graphs(LLM(dtype="float32"), captures)
    assert answers(llm, PROMPTS) == expected
    assert captures == [4]  # three requests in a bucket of four, captured once
    assert answers(llm, PROMPTS[:1]) == expected[:1] and captures == [4, 1]
    assert answers(llm, PROMPTS) == expected and captures == [4, 1]


def test_rows_that_no_request_has_store_nothing():
    batch = DecodingBatch(4, 8, 16, 128, torch.device("cpu"))
    request = Request([1] * 20, SamplingParams(), 40, answer=[7], pages=[5, 3])
    request.computed, request.running_sequence = 20, [7]
    batch.fill([request])
    assert batch.ids.tolist() == [7, 0, 0, 0] and batch.positions.tolist() == [20, 0, 0, 0]
    assert batch.step.slot_mapping.tolist() == [3 * 16 + 4, -1, -1, -1]
    assert batch.step.context_lens.tolist() == [21, 1, 1, 1]


def test_more_requests_than_any_graph_has_run_without():
    assert bucket_of(BUCKETS[-1] + 1) is None


def test_kernels_that_look_at_the_host_are_named_as_the_reason():
    reason = why_not_captured(LLM(dtype="float32").model)
    assert reason is not None and "looks at the host" in reason


@pytest.mark.parametrize(
    ("dtype", "experts", "forced", "culprit"),
    [
        ("bfloat16", False, {}, None),
        ("float32", False, {}, "model.layers.0.self_attn.attn runs torch_sdpa"),
        ("bfloat16", True, {}, None),
        ("bfloat16", True, {"experts": "linear"}, "model.layers.0.mlp.experts.0 runs linear"),
    ],
)
def test_a_plan_says_whether_a_gpu_would_capture_its_decoding_steps(
    dtype, experts, forced, culprit, tmp_path
):
    folder = write_moe(tmp_path, "qwen3_moe", "awq-g32").folder if experts else shipped_model()
    planned = plan(folder, device="cuda:sm90", dtype=dtype, kernels=forced)
    notes = [note for note in planned.notes if note.startswith("decoding runs without a captured CUDA graph")]
    assert planned.decoding_graph["captured"] == (culprit is None) == (not notes)
    if culprit is not None:
        why = planned.decoding_graph["why_not"]
        assert why.startswith(culprit) and notes[0].endswith(why)
    assert plan(folder, device="cpu", dtype=dtype).decoding_graph is None


def step_logits(llm, prompts, count):
    """The logits of each step, and the answers."""
    runner, found = llm.engine.runner, []
    run = runner.step

    def step(requests, cache):
        found.append(run(requests, cache).clone())
        return found[-1]

    runner.step = step
    return found, answers(llm, prompts, count)


SPANNING = {
    "fp8 of a tensor": ("fp8:granularity=tensor,activations=tensor", True),
    "fp8 of tokens": ("fp8:granularity=tensor,activations=token", False),
}


@pytest.mark.parametrize("kind", SPANNING)
def test_spare_rows_change_no_scale_that_is_one_of_all_rows(kind):
    """Three requests: a fourth row of a bucket would have its part in the scales of activations."""
    method, spans = SPANNING[kind]

    def make():
        return LLM(quant={"**": method}, dtype="bfloat16", compute="checkpoint")

    (expected, tokens), captures = step_logits(make(), PROMPTS, 6), []
    found, others = step_logits(with_graphs(make(), captures), PROMPTS, 6)
    assert captures == [3 if spans else 4]
    assert others == tokens
    for logits, wanted in zip(found, expected, strict=True):
        assert torch.equal(logits, wanted)


def short_of_the_likeliest(llm, prompts, answered):
    """By how much the logits of answers fall short of the highest, by an eager run, in parts of the largest logit."""
    worst = 0.0
    for prompt, answer in zip(prompts, answered, strict=True):
        logits = llm.logits([*prompt, *answer])[len(prompt) - 1 : -1].float()
        short = logits.amax(-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
        worst = max(worst, float((short / logits.abs().amax(-1)).max()))
    return worst


# A captured step has other splits than an eager one, and sums in another order: two tokens that are as likely as each
# other within rounding to bfloat16 may change places, others may not.
LEVEL = 2**-5


def test_answers_of_another_model_fall_short_of_the_likeliest():
    llm = LLM(dtype="bfloat16")
    found = answers(with_graphs(llm, []), PROMPTS)
    assert short_of_the_likeliest(llm, PROMPTS, found) <= LEVEL
    shifted = [tuple((token + 1) % 200 for token in answer) for answer in found]
    assert short_of_the_likeliest(llm, PROMPTS, shifted) > 4 * LEVEL


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_chooses_what_an_eager_one_finds_likeliest():
    llm = LLM(device="cuda", dtype="bfloat16")
    found = answers(llm, PROMPTS)
    runner = llm.engine.runner
    assert runner.why_eager is None and any(batch.replay for batch in runner._decoding.values())
    assert llm.plan.decoding_graph == {"captured": True, "why_not": None}
    assert short_of_the_likeliest(llm, PROMPTS, found) <= LEVEL
