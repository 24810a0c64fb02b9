"""SmolLM2-135M-Instruct, a chat model that people use, as a GGUF file: beside llama.cpp, transformers and gguf.

golden.json has what llama.cpp made of the same file; make_golden.py says how.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import gguf
import pytest
import torch
import transformers

import pymllm
from pymllm.cli import main
from pymllm.engine.sampling import SamplingParams
from tests.server.conftest import serve

# In nats. llama.cpp rounds activations to eight bits beside these weights, as we do to other eight bits: where its two
# likeliest tokens are nearer than this, either may come.
NEAR = 0.5
QUESTION = "What is 2 + 2?"


def test_the_file_is_the_one_that_the_golden_file_is_of(model, golden):
    assert hashlib.sha256(model.read_bytes()).hexdigest() == golden["sha256"]


def test_texts_and_chats_become_llama_cpp_s_tokens(llm, golden):
    for one in golden["texts"]:
        assert llm.tokenizer.encode(one["text"], add_special_tokens=False) == one["ids"], one["text"]
    for chat in golden["chats"]:
        assert llm.tokenizer.render_chat(chat["messages"]) == chat["prompt"]
        assert list(llm.tokenizer.apply_chat_template(chat["messages"])) == chat["prompt_ids"]


@pytest.mark.parametrize("number", range(4))
def test_answers_are_llama_cpp_s_up_to_where_it_is_undecided(llm, golden, number):
    chat = golden["chats"][number]
    answer = llm.chat(chat["messages"], SamplingParams(max_tokens=24))
    pairs = list(zip(answer.token_ids, chat["token_ids"], strict=False))
    same = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))
    if same < len(pairs):
        first, second = chat["likeliest"][same][:2]
        assert first[1] - second[1] < NEAR, f"token {same}: {answer.text!r}, not {chat['text']!r}"
    else:
        assert answer.text == chat["text"] and len(answer.token_ids) == len(chat["token_ids"])
    assert number > 1 or same == len(chat["token_ids"])  # these two it is sure of


@pytest.mark.parametrize("number", range(4))
def test_log_probabilities_are_near_llama_cpp_s(llm, golden, number):
    chat = golden["chats"][number]
    ids = chat["prompt_ids"] + chat["token_ids"]
    ours = llm.logits(ids).log_softmax(-1)[len(chat["prompt_ids"]) - 1 : -1]
    apart = []
    for row, theirs in zip(ours, chat["likeliest"], strict=False):
        apart += [abs(float(row[token]) - value) for token, value in theirs]
        if theirs[0][1] - theirs[1][1] > NEAR:
            assert int(row.argmax()) == theirs[0][0]
    assert len(apart) == 5 * len(ours)
    assert max(apart) < 0.7 and sum(apart) / len(apart) < 0.12


def test_without_rounding_logits_are_those_of_transformers(model, golden):
    """transformers reads the same file into float32 with the package gguf."""
    exact = pymllm.LLM(
        model, device="cpu", dtype="float32", compute="exact", kv_cache="float32", progress=False
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).eval()
    for chat in golden["chats"][:2]:
        ids = chat["prompt_ids"]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
        ours = exact.logits(ids)
        assert float((ours - expected).abs().max()) < 2e-3 * float(expected.abs().max())
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def test_the_plan_has_every_tensor_of_the_file_in_its_type(model):
    planned = pymllm.plan(model, device="cpu")
    stored = Counter(
        tensor.tensor_type.name
        for tensor in gguf.GGUFReader(model).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2 and tensor.shape[1] > 1
    )
    found = Counter(
        layer.method_detail.removeprefix("gguf ") for layer in planned.layers if layer.kind == "linear"
    )
    assert found == stored and sum(found.values()) == 7 * 30
    assert not [layer.prefix for layer in planned.layers if layer.kernel == "reference"]


def test_a_command_answers_through_the_template(model, capsys):
    arguments = ["run", str(model), "--chat", "--prompt", QUESTION, "--temperature", "0", "--json"]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"].strip() == "The answer is 4." and printed["finish_reason"] == "stop"


def test_what_is_taken_over_of_a_chat_changes_the_last_bits_of_sums_at_most(model):
    """docs/engine.md: a prompt that is read in other pieces; the same pieces give the same bits."""
    messages = [
        {"role": "user", "content": "Name three colours, and say of each where it is found in nature."},
        {"role": "assistant", "content": "Green in leaves, blue in the sky, and red in poppies."},
        {"role": "user", "content": "Which of them is the warmest?"},
    ]
    wanted = SamplingParams(max_tokens=16, logprobs=2)
    answers = []
    for reuse in (True, True, False):
        llm = pymllm.LLM(model, device="cpu", compute="exact", progress=False, prefix_reuse=reuse)
        llm.chat(messages[:1], SamplingParams(max_tokens=4))
        answers.append(llm.chat(messages, wanted))
    first, again, alone = answers
    assert first.cached_tokens >= 32 and alone.cached_tokens == 0
    assert first.logprobs == again.logprobs
    assert first.token_ids == alone.token_ids
    for one, other in zip(first.logprobs, alone.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_server_answers_a_chat(llm):
    with serve(llm) as served:
        answer = served.client().chat.completions.create(
            model=served.client().models.list().data[0].id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "The answer is 4."
    assert answer.choices[0].finish_reason == "stop"


def test_it_is_measured(model, capsys):
    sizes = ("-p", "32", "-n", "8", "-r", "2", "-b", "1,2", "--device", "cpu", "--json")
    assert main(["bench", str(model), *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in found["rows"]] == ["pp32", "tg8"] * 2
    assert {group["layers"] for group in found["kernels"] if group["kind"] == "linear"} == {210}
