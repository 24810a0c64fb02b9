"""Trajectories and metrics of generations: a scripted run against numbers worked out by hand, and a real one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from pymllm.engine.outputs import (
    METRICS,
    GenerationOutputs,
    ReqStep,
    ReqTrajectory,
    decode_token_ids_robust,
)
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import RequestError


class Words:
    """Ids are words of a list."""

    words = ("zero", "one", "two", "three", "<end>")
    eos_token = "<end>"

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(self.words[i] for i in ids)


class Strict(Words):
    """Its decode takes no options, so the pieces are asked for."""

    def decode(self, ids):
        raise AssertionError("never reached")

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] if i < len(self.words) else None for i in ids]

    def convert_tokens_to_string(self, tokens):
        return "+".join(tokens)


@pytest.mark.parametrize("ids", (None, [], ()))
def test_no_tokens_are_no_text_whatever_the_tokenizer(ids):
    assert decode_token_ids_robust(object(), ids) == ""


def test_only_a_type_error_falls_back():
    assert decode_token_ids_robust(Words(), [1, 2]) == "one two"
    assert decode_token_ids_robust(Strict(), [1, 9, 2]) == "one+two", "an unknown id has no piece"

    class Broken(Strict):
        def decode(self, ids, skip_special_tokens=False):
            raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        decode_token_ids_robust(Broken(), [1])


def test_special_tokens_are_kept_unless_asked():
    class Records(Words):
        def decode(self, ids, skip_special_tokens):
            return f"{ids} {skip_special_tokens}"

    assert decode_token_ids_robust(Records(), [1]) == "[1] False"
    assert decode_token_ids_robust(Records(), [1], skip_special_tokens=True) == "[1] True"


def block(block_id, masked, active=True):
    status = "ACTIVE" if active else "DUMMY"
    state = {"is_active": active, "is_dummy": not active, "status": status}
    return SimpleNamespace(block_id=block_id, block_size=4, num_mask_tokens=masked, **state)


def request(req_id, ran, got, response, prefill=False, reason=None, **state):
    """A request after a step: the tokens it ran, how many it got, all it has."""
    ended = bool(response) and response[-1] == 4
    return SimpleNamespace(
        **{
            "req_id": req_id,
            "is_prefilling": prefill,
            "new_tokens": got,
            "running_sequence": ran,
            "block_size": 4,
            "blocks": (),
            "truncated_response": response[:-1] if ended else response,
            "full_response": response,
            "is_truncated": ended,
            "max_new_tokens_reached": reason == "length",
            "max_model_len_reached": False,
            "max_nfe_reached": False,
            "max_repetition_run_reached": False,
            "eos_token_generated": ended,
            "completion_reason": reason,
            **state,
        }
    )


def scripted():
    """Two requests: the second comes a step later; a block strategy, so that steps give none to two tokens.

    step     1: 0.5 s     2: 0.25 s      3: 0.125 s    4: 0.125 s
    first    prefill 3, 1 token          2 tokens      1 token (its end)
    second                prefill 5, 0   1 token       2 tokens
    """
    outputs = GenerationOutputs(2)
    outputs.record_step([request(7, [1, 2, 3], 1, [1], prefill=True)], 0.5, {7: 0, 8: 1})
    outputs.record_step([request(8, [1] * 5, 0, [], prefill=True)], 0.25, {7: 0, 8: 1})
    outputs.record_step(
        [request(7, [1], 2, [1, 2, 3]), request(8, [0], 1, [2], blocks=[block(5, 1), block(6, 4, False)])],
        0.125,
        {7: 0, 8: 1},
    )
    outputs.record_step(
        [
            request(7, [3], 1, [1, 2, 3, 4], reason="stop"),
            request(8, [2], 2, [2, 0, 1], reason="length"),
        ],
        0.125,
        {7: 0, 8: 1},
    )
    outputs.record_step([], 9.0)
    return outputs


def test_metrics_are_those_worked_out_by_hand():
    outputs = scripted()
    assert outputs.metrics() == {
        "tpf": (3 / 2 + 3 / 2) / 2,
        "ttft": (0.5 + (0.25 + 0.125)) / 2,
        "tpot": (0.25 / 3 + 0.125 / 2) / 2,
        "throughput": 7 / 1.0,
        "prefill_throughput": 8 / 0.75,
        "decode_throughput": 6 / 0.25,
        "e2e_throughput": 6 / 1.0,
        "total_time": 1.0,
        "prefill_time": 0.75,
        "decode_time": 0.25,
        "e2e_time": 0.75 + 0.5,
        "batch_step_count": 4,
        "generated_tokens": 7,
        "prefill_tokens": 8,
        "decode_tokens": 6,
        "e2e_tokens": 6,
    }


def test_a_step_of_both_kinds_counts_for_both_times():
    outputs = GenerationOutputs(2)
    outputs.record_step([request(0, [1, 1], 1, [1], prefill=True), request(1, [1], 1, [1])], 2.0)
    assert (outputs.prefill_time, outputs.decode_time, outputs.total_time) == (2.0, 2.0, 2.0)
    assert (outputs.prefill_throughput, outputs.decode_throughput) == (1.0, 0.5)


def test_text_that_is_read_again_is_no_decoding():
    outputs = GenerationOutputs(1)
    outputs.record_step([request(0, [5, 6], 0, [1, 2], is_reading=True)], 1.0)
    outputs.record_step([request(0, [2], 1, [1, 2, 3], is_reading=False)], 1.0)
    assert (outputs.tpf, outputs.prefill_time, outputs.decode_tokens) == (1.0, 1.0, 1)
    assert [step.is_prefill for step in outputs.trajectories[0].trajectory] == [True, False]


def test_nothing_recorded_is_zero_everywhere():
    assert set(GenerationOutputs(3).metrics().values()) == {0}
    assert set(METRICS) == set(GenerationOutputs(0).metrics())
    assert GenerationOutputs(1).to_benchmark_format() == [
        {"text": "", "full_text": "", "token_ids": [], "nfe": 0}
    ]


def test_trajectories_keep_every_step_and_flag():
    first, second = scripted().trajectories
    assert [step.step_id for step in first.trajectory] == [0, 1, 2]
    assert first.trajectory[0] == ReqStep(0, 0.5, True, 1, [1, 2, 3], 4, [], [])
    assert (first.token_ids, first.full_token_ids) == ([1, 2, 3], [1, 2, 3, 4])
    assert (first.is_truncated, first.eos_token_generated, first.completion_reason) == (True, True, "stop")
    assert (second.is_truncated, second.max_new_tokens_reached) == (False, True)
    assert second.completion_reason == "length" and second.req_id == 1
    traced = second.trajectory[1]
    assert traced.buffer_bids == [5, 6] and traced.block_size == 4
    assert traced.block_trace == [
        {
            **{"block_id": 5, "is_active": True, "is_dummy": False, "num_mask_tokens": 1},
            **{"mask_ratio": 0.25, "progress": 0.75, "block_status": "ACTIVE"},
        },
        {
            **{"block_id": 6, "is_active": False, "is_dummy": True, "num_mask_tokens": 4},
            **{"mask_ratio": 1.0, "progress": 0.0, "block_status": "DUMMY"},
        },
    ]
    fields = second.to_dict()
    assert json.loads(json.dumps(fields)) == fields and fields["trajectory"][1]["buffer_bids"] == [5, 6]
    assert ReqTrajectory(3).to_dict()["text"] is None


@pytest.mark.parametrize("value, traced", (("0", False), ("1", True), (None, True)))
def test_the_environment_turns_block_traces_off(monkeypatch, value, traced):
    monkeypatch.delenv("PYMLLM_SAVE_TRACE", raising=False)
    if value is not None:
        monkeypatch.setenv("PYMLLM_SAVE_TRACE", value)
    step = scripted().trajectories[1].trajectory[1]
    assert bool(step.block_trace) is traced and step.buffer_bids == [5, 6]


def test_text_ends_before_the_end_token_and_full_text_has_it():
    outputs = scripted()
    outputs.trajectories[1].token_ids = [2, 4, 1]  # a strategy that writes past the end
    outputs.convert_to_text(Words())
    first, second = outputs.to_benchmark_format()
    assert (first["text"], first["full_text"]) == ("one two three", "one two three <end>")
    assert second["text"] == "two " and second["nfe"] == 3 and second["token_ids"] == [2, 4, 1]


def test_a_real_generation_is_recorded(llm):
    prompts = ["def f(x):\n", "import os\nimport sys\n"]
    outputs = GenerationOutputs(2)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    answers = llm.generate(prompts, params, outputs=outputs)
    outputs.convert_to_text(llm.tokenizer)
    for trajectory, answer, prompt in zip(outputs.trajectories, answers, prompts, strict=True):
        assert trajectory.full_token_ids == list(answer.token_ids) and trajectory.text == answer.text
        assert trajectory.trajectory[0].running_token_ids == llm.encode(prompt)
        assert [step.is_prefill for step in trajectory.trajectory] == [True] + [False] * 4
        assert trajectory.max_new_tokens_reached and trajectory.completion_reason == "length"
    assert outputs.batch_step_count == 5 and outputs.tpf == 1.0
    assert outputs.generated_tokens == 10 and outputs.decode_tokens == 8
    assert outputs.prefill_tokens == sum(len(llm.encode(prompt)) for prompt in prompts)
    assert 0 < outputs.ttft < outputs.total_time and outputs.tpot > 0
    assert outputs.total_time == pytest.approx(outputs.prefill_time + outputs.decode_time)


def test_an_end_token_and_a_stop_string_are_told_apart(llm):
    free = llm.generate("def f(x):\n", SamplingParams(max_tokens=8, ignore_eos=True))[0]
    by_token, by_text = GenerationOutputs(1), GenerationOutputs(1)
    end = free.token_ids[3]
    llm.generate("def f(x):\n", SamplingParams(max_tokens=8, stop_token_ids=(end,)), outputs=by_token)
    (trajectory,) = by_token.trajectories
    stopped = free.token_ids.index(end)
    assert trajectory.eos_token_generated and trajectory.token_ids == list(free.token_ids[:stopped])
    assert trajectory.full_token_ids == list(free.token_ids[: stopped + 1]) and trajectory.is_truncated
    stop = free.text.strip()[0]
    llm.generate("def f(x):\n", SamplingParams(max_tokens=8, stop=(stop,)), outputs=by_text)
    (trajectory,) = by_text.trajectories
    assert trajectory.completion_reason == "stop" and not trajectory.eos_token_generated


def test_one_thread_cannot_start_a_second_generation_inside_a_stream(llm):
    stream = llm.stream("import os", SamplingParams(max_tokens=4, ignore_eos=True))
    next(stream)
    with pytest.raises(RequestError, match="has not ended"):
        llm.generate("import sys", SamplingParams(max_tokens=1))
    assert len(list(stream)) == 3
    assert llm.generate("import sys", SamplingParams(max_tokens=1))[0].token_ids
