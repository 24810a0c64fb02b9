"""Ranks that follow rank 0: real processes give the answers of one, whatever the model and the engine do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import sys

import pytest
import torch

import pymllm
from pymllm import LLM, SamplingParams
from pymllm.engine.choosing import describe
from pymllm.errors import ConfigError, KernelError, RankError
from pymllm.parallel.leader import MOST_STRANGERS
from pymllm.parallel.link import decode, encode

from ..adapters.handwritten import random_adapter
from ..block_checkpoints import write_blocks
from ..checkpoints import relative_error, write_checkpoint
from ..moe_checkpoints import write_moe

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no Gloo here"),
    pytest.mark.skipif(sys.platform != "linux", reason="ranks end with rank 0 as Linux has it"),
]
ODDS = random.Random(3)
PROMPTS = [[ODDS.randrange(90) for _ in range(length)] for length in (90, 1, 17, 17)]
PROMPTS.append(PROMPTS[0][:85])
THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 192}
# How each is written, of how many ranks, and how it is loaded.
MODELS = {
    "odd heads": (write_checkpoint, ("qwen3", "none"), THREE, 3, {}),
    "awq, keys in fp8": (write_checkpoint, ("qwen2", "awq-g32"), {}, 2, {"kv_cache": "fp8"}),
    "experts shared": (write_moe, ("mixtral", "none"), {}, 2, {}),
    "experts whole": (write_moe, ("qwen3_moe", "fp8-block"), {}, 2, {"expert_parallel": True}),
    "states": (write_checkpoint, ("qwen3_5_text",), {"max_position_embeddings": 256}, 2, {}),
    "by blocks": (write_blocks, ("sdar",), {}, 2, {}),
}


def outputs(llm, **settings):
    """Answers in steps of few tokens, and once more with what the first have left in the cache."""
    llm.engine.scheduler.step_tokens = 24
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **settings)
    found = [llm.generate(PROMPTS, params) for _ in range(2)]
    return [[(output.token_ids, output.cached_tokens) for output in answers] for answers in found]


@pytest.fixture
def pair():
    """Makes the same LLM on one rank and on several; the latter ends with the test."""
    opened = []

    def make(model, size, **options):
        options = {"dtype": "float32", "device": "cpu", **options}
        whole = {name: value for name, value in options.items() if name != "expert_parallel"}
        opened.append(LLM(model, tensor_parallel_size=size, **options))
        return LLM(model, **whole), opened[-1]

    yield make
    for llm in opened:
        llm.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", MODELS)
def test_several_ranks_answer_token_for_token_as_one(tmp_path, pair, name):
    write, words, settings, size, options = MODELS[name]
    checkpoint = write(tmp_path / "m", *words, **settings)
    one, several = pair(checkpoint.folder, size, **options)
    expected = outputs(one)
    assert outputs(several) == expected
    assert any(cached for _, cached in expected[1])
    ids = PROMPTS[0]
    assert relative_error(several.logits(ids), one.logits(ids).double()) <= 1e-5
    assert several.why_not_healthy() is None and set(several.ping()) == set(range(1, size))
    children = [child.process for child in several.parallel.leader.children.values()]
    several.close()
    assert [process.poll() for process in children] == [0] * (size - 1)


def test_what_requests_can_ask_for(tmp_path, pair, monkeypatch):
    """Scores, also one that fails, adapters, seeds and n, an abort in the middle, drafts from the text, vectors."""
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32")
    targets = ("q_proj", "v_proj", "o_proj", "down_proj")
    for seed, name in enumerate(("first", "second")):
        random_adapter(tmp_path / name, checkpoint, targets, seed=seed)
    loaded = {"first": tmp_path / "first"}
    one, several = pair(checkpoint.folder, 2, adapters=loaded, strategy="prompt_lookup", pooling="mean")
    for llm in (one, several):
        llm.load_adapter("second", tmp_path / "second")
    drawn = SamplingParams(
        temperature=0.9, top_p=0.9, seed=5, n=3, max_tokens=8, logprobs=1, prompt_logprobs=0
    )
    adapters = [None, "first", "second", None, "first"]
    answers = [llm.generate(PROMPTS, drawn, adapter=adapters) for llm in (one, several)]
    for a, b in zip(*answers, strict=True):
        assert [each.token_ids for each in a.outputs] == [each.token_ids for each in b.outputs]
        for p, q in zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], strict=True):
            assert p.token_id == q.token_id and abs(p.logprob - q.logprob) < 1e-4
    stream = several.stream(PROMPTS[0], SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    next(stream)
    stream.close()
    with monkeypatch.context() as patched, several.session() as session:
        patched.setattr("pymllm.engine.engine.describe", _describe_all_but(89))
        scored = [
            session.add(ids, SamplingParams(max_tokens=1, prompt_logprobs=0)) for ids in ([1, 2], [1, 89])
        ]
        while not all(request.finish_reason for request in scored):
            session.step()
        assert [request.error is None for request in scored] == [True, False]
    vectors = [llm.embed(PROMPTS, adapter="second") for llm in (one, several)]
    assert relative_error(vectors[1], vectors[0].double()) <= 1e-5
    with pytest.raises(ConfigError):
        several.unload_adapter("third")
    several.unload_adapter("second")
    greedy = SamplingParams(temperature=0, max_tokens=4)
    one.merge_adapter("first")
    several.merge_adapter("first")
    assert (
        several.generate(PROMPTS[:1], greedy)[0].token_ids == one.generate(PROMPTS[:1], greedy)[0].token_ids
    )
    several.close()
    with pytest.raises(RankError, match="have been ended"):
        several.logits([1])


def _describe_all_but(bad):
    def describe_or_fail(logits, tokens, *rest):
        if bad in tokens:
            raise KernelError("no numbers", code="logits-nan")
        return describe(logits, tokens, *rest)

    return describe_or_fail


def test_a_draft_model_follows_too(tmp_path, pair):
    target = write_checkpoint(tmp_path / "one", "llama").folder
    drafting = write_checkpoint(tmp_path / "two", "llama", num_hidden_layers=1).folder
    one, several = pair(target, 2, strategy=f"draft_model:path={drafting}")
    assert outputs(several) == outputs(one)


def test_the_shipped_model_answers_tasks_of_an_event_loop_and_follows_a_grammar(pair):
    pytest.importorskip("llguidance")
    one, several = pair(None, 2)
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    asked = [
        SamplingParams(max_tokens=24, temperature=0),
        SamplingParams(max_tokens=24, temperature=0, json_schema=schema),
    ]

    async def answers(llm):
        async with pymllm.AsyncLLM(llm) as shared:
            stream = shared.stream("def f(", SamplingParams(max_tokens=500, temperature=0))
            await anext(stream)
            await stream.aclose()
            return await asyncio.gather(*(shared.generate("def f(x):", params) for params in asked))

    found = [[a.text for each in asyncio.run(answers(llm)) for a in each] for llm in (one, several)]
    assert found[0] == found[1]


SLOW_TO_END = """
import os, sys, time
from pymllm import follower
leave = follower.leave_process_group
follower.leave_process_group = lambda alone: (time.sleep(1), leave(alone=alone))
os._exit(follower.main())
"""


def test_a_rank_that_takes_its_time_ends_by_itself(monkeypatch):
    monkeypatch.setattr("pymllm.parallel.leader.FOLLOWER", ("-c", SLOW_TO_END))
    llm = LLM(tensor_parallel_size=2, device="cpu")
    (child,) = llm.parallel.leader.children.values()
    llm.close()
    assert child.process.poll() == 0


def test_a_rank_that_is_stopped_before_it_comes_is_lost(monkeypatch):
    monkeypatch.setattr("pymllm.parallel.leader.SILENCE", 0.5)
    stops = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    monkeypatch.setattr("pymllm.parallel.leader.FOLLOWER", ("-c", stops))
    with pytest.raises(RankError, match="rank 1 of 2 is lost; found it is stopped"):
        LLM(tensor_parallel_size=2, device="cpu")


def test_strangers_and_what_cannot_be_done_are_refused(pair):
    _, several = pair(None, 2)
    own = several.parallel.leader
    hello = {"is": "hello", "rank": 1, "size": 2}
    for said in (
        b"GET / HTTP/1.1\r\n\r\n",
        encode({**hello, "key": "guessed"}),
        encode({**hello, "key": "\ud800"}),
        encode({**hello, "key": own.key}),
    ):
        with socket.create_connection(own.address) as stranger:
            stranger.sendall(said)
            answer = bytearray()
            with contextlib.suppress(ConnectionError):
                while data := stranger.recv(4096):
                    answer += data
        assert said.startswith(b"GET") or decode(answer)[0]["is"] == "refused"
    with contextlib.ExitStack() as silent:
        for _ in range(2 * MOST_STRANGERS):
            last = silent.enter_context(socket.create_connection(own.address))
        last.sendall(encode({**hello, "key": "guessed"}))
        assert decode(bytearray(last.recv(4096)))[0]["is"] == "refused"
        assert len(own._strangers) <= MOST_STRANGERS
    with pytest.raises(ConfigError, match="cannot be told"):
        pymllm.swap(several, "**.mlp.**", "int8")
    with pytest.raises(ConfigError, match="ranks already"):
        LLM(tensor_parallel_size=2)
    assert several.why_not_healthy() is None
