"""Memory that cannot be had at any tensor of a step: who is concerned ends with one error, and the engine lives on."""

from __future__ import annotations

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.tape_memory import NoRoom, StepMemory
from pymllm.errors import ConfigError

from ..checkpoints import write_checkpoint
from ..injecting import Memory
from .crowd import check_nothing_left

TOGETHER = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10, 11, 12, 13]]
SETTINGS = (
    SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.9, seed=3, logprobs=2),
)
LONG = [[5] * 70 + [6, 7, 8] + [9] * 20, [5] * 70 + [3, 4]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "plain", "llama", max_position_embeddings=256)
    write_checkpoint(folder / "states", "qwen3_5_text", max_position_embeddings=256)
    options = {"dtype": "float32", "progress": False}
    drafts = "prompt_lookup:drafts=4,longest=3,shortest=1"
    made = {
        "plain": LLM(folder / "plain", **options),
        "states": LLM(folder / "states", **options),
        "drafts": LLM(folder / "plain", strategy=drafts, **options),
        "draft model": LLM(folder / "plain", strategy=f"draft_model:path={folder / 'plain'}", **options),
    }
    made["states"].engine.remembered_states = 8
    return made


def run(llm: LLM, prompts, memory=None):
    """Run requests together, from a recording of no step.  Returns them."""
    llm.engine.runner._decoding.clear()
    with llm.session() as session:
        requests = [session.add(list(p), one) for p, one in zip(prompts, SETTINGS, strict=True)]
        with memory or Memory():
            while session.unfinished:
                session.step()
    check_nothing_left(llm.engine)
    return requests


def sweep(name, model, prompts, stays, every):
    run(model, prompts)
    counted = Memory()
    expected = [tuple(request.answer) for request in run(model, prompts, counted)]
    assert counted.made > 50
    fates = set()
    # A step that is prime to how many tensors a layer makes meets each kind of them.
    for number in range(0, counted.made, every):
        memory = Memory(number, stays=stays)
        for request, answer in zip(run(model, prompts, memory), expected, strict=True):
            fates.add(type(request.error).__name__)
            if request.error is None:
                assert tuple(request.answer) == answer, number
            else:
                assert isinstance(request.error, ConfigError) and request.error.code == "out-of-memory"
                assert request.error.fix and "4096 bytes more" in str(request.error)
                assert tuple(request.answer) == answer[: len(request.answer)]
    assert [tuple(request.answer) for request in run(model, prompts)] == expected, name
    return fates


@pytest.mark.parametrize("name", ["plain", "states", "drafts"])
def test_a_step_that_lacks_memory_once_is_run_again(models, name):
    assert sweep(name, models[name], LONG if name == "states" else TOGETHER, False, 41) == {"NoneType"}


@pytest.mark.parametrize("name", ["plain", "states", "draft model"])
def test_requests_that_lack_memory_for_good_end_with_one_error(models, name):
    fates = sweep(name, models[name], LONG if name == "states" else TOGETHER, True, 67)
    assert "ConfigError" in fates


def test_one_request_alone_that_lacks_memory_once_fails_and_the_next_is_answered(models):
    llm = models["plain"]
    llm.engine.runner._decoding.clear()
    with pytest.raises(ConfigError, match="run out of memory") as caught, Memory(3):
        llm.generate([TOGETHER[0]], SETTINGS[0])
    assert caught.value.code == "out-of-memory"
    check_nothing_left(llm.engine)
    assert llm.generate([TOGETHER[0]], SETTINGS[0])[0].token_ids


@pytest.mark.parametrize("name", ["plain", "states"])
def test_a_load_that_lacks_memory_is_one_error_with_numbers(models, name):
    folder = models[name].plan.model if hasattr(models[name].plan, "model") else None
    assert folder is not None
    memory = Memory()
    with memory:
        LLM(folder, dtype="float32", progress=False)
    for number in range(memory.made // 2, memory.made, memory.made // 7):
        # What is lacking for a layer that is read ahead is asked for again in its turn.
        with pytest.raises(ConfigError) as caught, Memory(number, stays=True):
            LLM(folder, dtype="float32", progress=False)
        assert caught.value.code == "out-of-memory"


def test_a_step_is_not_recorded_where_there_is_no_room_for_it():
    memory = StepMemory(1 << 49)
    with pytest.raises(NoRoom, match="there are no 536870912 MiB"):
        memory.take(torch.ones(3))
