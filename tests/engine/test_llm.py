"""The front door: what `LLM` answers, against transformers and against itself."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pymllm
from pymllm import LLM, SamplingParams
from pymllm.api import shipped_model
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.errors import CheckpointError, RequestError

from ..checkpoints import write_checkpoint
from ..processes import python
from ..shipped_model import test_shipped_model as shipped
from .answers import greedy

PROMPT = "def read_lines(path):\n"


@functools.cache
def dequantized_model() -> LlamaForCausalLM:
    """The shipped model in transformers, float32, from the numpy decoder of the shipped model's own tests."""
    config = json.loads((shipped_model() / "config.json").read_text())
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    tensors = load_file(shipped_model() / "model.safetensors")
    model.load_state_dict(shipped.dequantized_state(tensors, shipped.linear_shapes(config)))
    return model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


def test_greedy_text_equals_transformers_on_the_same_dequantised_weights(llm):
    ids = torch.tensor([llm.tokenizer.encode(PROMPT)])
    reference = dequantized_model()
    with torch.no_grad():
        expected = reference.generate(
            ids, max_new_tokens=64, do_sample=False, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0
        )
    output = llm.generate(PROMPT, greedy(64))[0]
    assert list(output.token_ids) == expected[0, ids.shape[1] :].tolist()
    assert output.text == llm.tokenizer.decode(output.token_ids)


def test_a_batch_answers_as_its_requests_alone(llm):
    prompts = [PROMPT, "class Stack:\n", "import os\n", "x"]
    together = llm.generate(prompts, greedy(24))
    alone = [llm.generate(prompt, greedy(24))[0] for prompt in prompts]
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]


def test_waiting_requests_are_admitted_as_pages_return(monkeypatch):
    llm = LLM(dtype="float32")
    few = PagedKVCache(llm.model, 8, torch.device("cpu"))
    monkeypatch.setattr(llm.engine, "cache", few)
    prompts = [[1, 2, 3 + i] for i in range(6)]  # each needs 3 of the 8 pages
    outputs = llm.generate(prompts, greedy(40))
    assert [len(o.token_ids) for o in outputs] == [40] * 6
    assert len(few.free) == 8
    assert outputs[5].token_ids == LLM(dtype="float32").generate([prompts[5]], greedy(40))[0].token_ids


def test_streamed_pieces_make_up_the_text(llm):
    pieces = list(llm.stream(PROMPT, greedy(48)))
    assert "".join(piece.text for piece in pieces) == pieces[-1].output.text
    assert [piece.token_id for piece in pieces] == list(pieces[-1].output.token_ids)
    assert all(piece.output is None for piece in pieces[:-1])


def test_a_stop_string_ends_the_answer_and_is_left_out(llm):
    whole = llm.generate(PROMPT, greedy(40))[0].text
    stop = whole[12:17]
    output = llm.generate(PROMPT, greedy(40, stop=(stop,)))[0]
    assert output.finish_reason == "stop"
    assert output.text == whole[: whole.index(stop)]
    streamed = "".join(piece.text for piece in llm.stream(PROMPT, greedy(40, stop=(stop,))))
    assert streamed == output.text


def test_equal_seeds_give_equal_answers_and_other_seeds_others(llm):
    def answer(seed):
        return llm.generate(PROMPT, greedy(32, temperature=1.0, seed=seed))[0].token_ids

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_logprobs_are_those_of_the_logits(llm):
    output = llm.generate(PROMPT, greedy(3, logprobs=2))[0]
    ids = [*output.prompt_token_ids, *output.token_ids]
    expected = llm.logits(ids).log_softmax(-1)
    for index, entry in enumerate(output.logprobs):
        row = expected[len(output.prompt_token_ids) + index - 1]
        assert entry.token_id == output.token_ids[index]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_closing_a_stream_gives_its_pages_back(llm):
    before = len(llm.engine.cache.free)
    stream = llm.stream(PROMPT, greedy(64))
    next(stream), next(stream)
    assert len(llm.engine.cache.free) < before
    stream.close()
    assert len(llm.engine.cache.free) == before
    assert llm.engine.idle


def test_an_answer_ends_at_the_models_length(llm):
    longest = llm.engine.max_length
    output = llm.generate([[5] * (longest - 4)], greedy(100))[0]
    assert (len(output.token_ids), output.finish_reason) == (4, "length")


@pytest.mark.parametrize("prompt", ([1.5], [[1, 2]], [None]), ids=repr)
def test_what_is_no_prompt_is_refused(llm, prompt):
    for call in (llm.logits, lambda ids: llm.generate([ids])):
        with pytest.raises(RequestError, match="neither text nor token ids"):
            call(prompt)


def test_token_ids_may_be_a_tensor(llm):
    ids, params = [5, 6, 7], SamplingParams(max_tokens=4, temperature=0)
    expected = llm.generate([ids], params)[0].token_ids
    for prompts in (torch.tensor(ids), torch.tensor([ids]), [torch.tensor(ids)]):
        (output,) = llm.generate(prompts, params)
        assert output.token_ids == expected
    assert torch.equal(llm.logits(torch.tensor(ids)), llm.logits(ids))


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([], "prompt-empty"), ([10**6], "token-id"), ([-1], "token-id"), ([5] * 5000, "prompt-too-long")],
)
def test_a_prompt_that_cannot_run_is_refused_and_the_next_one_answered(llm, prompt, code):
    with pytest.raises(RequestError) as error:
        llm.generate([prompt], greedy(4))
    assert error.value.code == code
    assert len(llm.generate(PROMPT, greedy(2))[0].token_ids) == 2


def test_logits_of_a_text_that_fits_neither_the_model_nor_the_memory_are_refused(llm, monkeypatch):
    longest = llm.engine.model.max_length
    with pytest.raises(
        RequestError, match=f"the text is too long.*up to {longest} tokens, found {longest + 1}"
    ):
        llm.logits([5] * (longest + 1))
    monkeypatch.setattr("pymllm.engine.engine.available_memory", lambda _: 1000)
    with pytest.raises(RequestError, match="logits of the text take") as error:
        llm.logits([5] * 3)
    assert error.value.code == "out-of-memory"


def test_a_conversation_with_a_token_that_the_model_has_not_is_refused(llm, monkeypatch):
    tokenizer = copy.copy(llm.tokenizer)
    tokenizer.apply_chat_template = lambda messages, **settings: [5, llm.config.size("vocab_size")]
    monkeypatch.setattr(llm, "tokenizer", tokenizer)
    with pytest.raises(RequestError) as error:
        llm.chat([{"role": "user", "content": "x"}], greedy(2))
    assert error.value.code == "token-id"


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"temperature": -1},
            {"temperature": float("nan")},
            {"top_p": 0},
            {"max_tokens": 0},
            {"max_tokens": True},
        ),
        *(
            {"logprobs": 10**6},
            {"stop": ["x"] * 1000},
            {"stop": ""},
            {"seed": 2**70},
            {"repetition_penalty": 0},
        ),
    ],
)
def test_sampling_settings_out_of_range_name_the_parameter(settings):
    with pytest.raises(RequestError) as error:
        SamplingParams(**settings)
    assert error.value.param == next(iter(settings))


def test_repetition_penalty_equals_transformers(llm):
    ids = torch.tensor([llm.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        expected = dequantized_model().generate(
            ids, max_new_tokens=32, do_sample=False, repetition_penalty=1.3, eos_token_id=None, pad_token_id=0
        )
    output = llm.generate(PROMPT, greedy(32, repetition_penalty=1.3))[0]
    assert list(output.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_top_k_and_top_p_keep_only_the_likeliest(llm):
    best = llm.logits(llm.tokenizer.encode(PROMPT))[-1].topk(3).indices.tolist()
    for seed in range(12):
        one = llm.generate(PROMPT, greedy(1, temperature=5.0, top_k=3, seed=seed))[0].token_ids[0]
        assert one in best
        sure = llm.generate(PROMPT, greedy(1, temperature=1.0, top_p=1e-6, seed=seed))[0].token_ids[0]
        assert sure == best[0]


def test_a_checkpoint_without_tokenizer_runs_on_ids_and_says_what_text_needs(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    llm = LLM(tmp_path, dtype="float32")
    output = llm.generate([1, 2, 3], greedy(4))[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert list(output.token_ids) == expected[0, 3:].tolist() and output.text == ""
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="tokenizer"):
        llm.generate("text", greedy(4))


def test_chat_goes_through_the_checkpoints_template(llm):
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Write a function `add`"}])
    text = llm.tokenizer.decode(ids, skip_special_tokens=False)
    assert "Write a function `add`" in text and text != "Write a function `add`"
    assert llm.chat([{"role": "user", "content": "hello"}], greedy(4)).prompt_token_ids


@pytest.mark.parametrize("messages", ["hello", [], [{"content": "x"}], [{"role": "user"}], ["x"], None])
def test_what_is_no_conversation_is_refused(llm, messages):
    with pytest.raises(RequestError, match="conversation") as caught:
        llm.chat(messages)
    assert caught.value.tensor == "messages"


@pytest.mark.parametrize("params", [{"max_tokens": 4}, 5, [None], []])
def test_what_is_no_params_is_refused(llm, params):
    for call in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match="params") as caught:
            call("x", params)
        assert caught.value.tensor == "params"


def test_one_prompt_for_many_streams_is_one(llm):
    pieces = list(llm.stream_all("ab", greedy(1)))
    assert [place for place, _ in pieces] == [0]
    assert pieces[0][1].output.prompt_token_ids == tuple(llm.encode("ab"))
    with pytest.raises(RequestError, match="neither text"):
        llm.stream_all(None, greedy(1))


@pytest.mark.parametrize("adapter", [5, ["x"], [None, ["x"]]])
def test_what_is_no_name_of_an_adapter_is_refused(llm, adapter):
    for call in (llm.generate, llm.score):
        with pytest.raises(RequestError, match="adapter"):
            call(["x y", "y z"], adapter=adapter)


def test_import_pymllm_loads_no_torch():
    script = "import sys, pymllm; pymllm.__version__; sys.exit('torch' in sys.modules)"
    assert python("-c", script).returncode == 0


def test_the_readmes_names_are_exported():
    assert all(getattr(pymllm, name) is not None for name in pymllm.__all__)
    assert shipped_model().is_dir()
