"""Drafts change how fast answers come, and nothing else: token for token they are those of autoregressive decoding."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from pymllm import LLM, SamplingParams, plan
from pymllm.api import shipped_model
from pymllm.engine.engine import Engine
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.strategies.prompt_lookup import Lookup, PromptLookup
from pymllm.engine.strategies.speculation import Acceptance
from pymllm.errors import CheckpointError, ConfigError
from pymllm.models.strategy import choose_strategy
from pymllm.parallel import simulate

from ..checkpoints import write_checkpoint
from ..models.test_hybrid import write as hybrid
from .answers import answers, greedy

STRATEGIES = ("prompt_lookup", "prompt_lookup:drafts=6,longest=3,shortest=1", "draft_model")
COPIED = "The cat sat on the mat. The dog sat on the log. "
PROMPTS = [COPIED * 2 + "The cat", "Once upon a time", COPIED + "The", "a b a b a b a"]

SETTINGS = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 3},
    "filtered": {"temperature": 1.1, "seed": 4, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "typical_p": 0.98},
    "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "sampled penalties": {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.3},
    "bad words": {"bad_words": ("the", "sat on")},
    "biased": {"logit_bias": {5: 4.0, 300: -8.0}, "min_tokens": 24},
    "likely": {"logprobs": 4, "temperature": 0.7, "seed": 6},
    "stop": {"stop": ("cat", "og."), "ignore_eos": True},
    "stop tokens": {"stop_token_ids": (40, 46, 300), "min_tokens": 5},
    "prompt": {"prompt_logprobs": 1},
}


def make(strategy, model=None, *, step_tokens=1024, pages=None, drafting=None, **options):
    """Load a model that drafts whenever it can, whatever rows cost.  drafting: the second model."""
    if strategy == "draft_model":
        strategy = f"draft_model:path={drafting or model or shipped_model()}"
    llm = LLM(model, dtype="float32", strategy=strategy, **options)
    if pages is not None:
        llm.engine.cache = PagedKVCache(llm.model, pages, torch.device("cpu"))
    for name in ("cache", "states", "scheduler"):
        # Simulated ranks make them at the same time, which the lock of a cached property would forbid.
        if name not in vars(llm.engine):
            vars(llm.engine)[name] = vars(Engine)[name].func(llm.engine)
    llm.engine.scheduler.step_tokens = step_tokens
    llm.engine.strategy.row_cost = llm.engine.strategy.weight = 0.0
    return llm


def run(llm, prompts, params):
    """Answer prompts side by side.  Returns the finished requests."""
    with llm.session() as session:
        requests = [session.add(prompt, params) for prompt in prompts]
        while session.unfinished:
            session.step()
    assert sorted(llm.engine.cache.free) == list(range(llm.engine.cache.num_pages))
    return requests


@pytest.fixture(scope="module")
def plain():
    return LLM(dtype="float32")


@pytest.fixture(scope="module", params=STRATEGIES)
def drafting(request):
    return make(request.param)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_answers_are_those_of_autoregressive_decoding(plain, drafting, settings):
    params = SamplingParams(max_tokens=28, **settings)
    for prompts in (PROMPTS[:1], PROMPTS):
        for found, expected in zip(
            drafting.generate(prompts, params), plain.generate(prompts, params), strict=True
        ):
            assert found.token_ids == expected.token_ids
            assert found.text == expected.text
            assert found.finish_reason == expected.finish_reason
            assert found.logprobs == expected.logprobs
            assert found.prompt_logprobs == expected.prompt_logprobs


def test_a_prompt_to_copy_from_takes_fewer_steps_than_tokens(drafting):
    (request,) = run(drafting, [drafting.encode(PROMPTS[0])], greedy(40))
    assert 15 <= request.accepted <= request.drafted
    with drafting.session() as session:
        request = session.add(drafting.encode(PROMPTS[0]), greedy(40))
        tokens = []
        while session.unfinished:
            ((_, piece),) = session.step()
            tokens.append(len(piece.token_ids) if piece else 0)
    assert sum(tokens) == 40 and len(tokens) <= 22 and max(tokens) == 1 + drafting.engine.strategy.drafts


@pytest.mark.parametrize("tokens", (1, 2, 3, 4, 5, 6, 7, 8))
def test_an_answer_has_no_more_tokens_than_were_asked_for(plain, drafting, tokens):
    prompts = [plain.encode(prompt) for prompt in PROMPTS]
    requests = run(drafting, prompts, greedy(tokens))
    assert [tuple(r.answer) for r in requests] == answers(plain, prompts, greedy(tokens))
    assert {r.finish_reason for r in requests} == {"length"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_last_positions_of_the_model_and_of_the_cache_are_used(tmp_path, strategy):
    write_checkpoint(tmp_path, max_position_embeddings=61)
    prompt = [3, 4, 5, 6] * 4
    (expected,) = answers(LLM(tmp_path, dtype="float32"), [prompt], SamplingParams(max_tokens=None))
    assert len(expected) == 61 - 16
    for pages in (4, 9):
        (request,) = run(make(strategy, tmp_path, pages=pages), [prompt], SamplingParams(max_tokens=None))
        assert tuple(request.answer) == expected and request.finish_reason == "length"
    (request,) = run(make(strategy, tmp_path, pages=3), [prompt], SamplingParams(max_tokens=None))
    assert tuple(request.answer) == expected[: 48 - 16]


@pytest.mark.parametrize("family", ("mistral", "gemma2", "qwen3"))
@pytest.mark.parametrize("kv_cache", (None, "int8", "fp8"))
def test_wrong_drafts_leave_nothing_behind(tmp_path, family, kv_cache):
    """Another random model's drafts are wrong nearly always; windows and quantised caches see none of their keys."""
    settings = {"sliding_window": 7} if family != "qwen3" else {}
    write_checkpoint(tmp_path / "one", family, **settings)
    write_checkpoint(tmp_path / "two", "llama", seed=1)
    prompts = [[(7 * i * i + 3 * i + j) % 90 for i in range(5 + 13 * j)] for j in range(3)]
    params = greedy(24, temperature=1.5, seed=2)
    expected = answers(LLM(tmp_path / "one", dtype="float32", kv_cache=kv_cache), prompts, params)
    llm = make("draft_model", tmp_path / "one", drafting=tmp_path / "two", kv_cache=kv_cache, step_tokens=17)
    requests = run(llm, prompts, params)
    assert [tuple(request.answer) for request in requests] == expected
    assert sum(r.drafted for r in requests) > 5 * sum(r.accepted for r in requests)


@pytest.mark.parametrize("pages", (7, 10))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_requests_that_come_at_random_and_lose_their_pages_answer_as_if_alone(plain, strategy, pages):
    odds = random.Random(pages)
    text = [1 + (7 * i * i + 3 * i) % 250 for i in range(60)]
    prompts = [text[: odds.choice((0, 20))] + [5, 6, 7] * odds.randrange(1, 6) for _ in range(8)]
    params = [greedy(odds.choice((5, 40, 60)), temperature=odds.choice((0.0, 0.9)), seed=j) for j in range(8)]
    expected = [answers(plain, [prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    llm = make(strategy, pages=pages, step_tokens=24)
    requests, waiting = [], list(zip(prompts, params, strict=True))
    with llm.session() as session:
        while waiting or session.unfinished:
            if waiting and (odds.random() < 0.6 or not session.unfinished):
                requests.append(session.add(*waiting.pop(0)))
            session.step()
            if odds.random() < 0.1 and session.unfinished:
                session.abort(session.add([9, 9, 9, 9], greedy(9)))
    assert [tuple(request.answer) for request in requests] == expected
    assert sorted(llm.engine.cache.free) == list(range(pages))
    assert sum(request.preemptions for request in requests) > 0
    assert sum(request.accepted for request in requests) > 0


def test_a_chat_finds_the_pages_of_tokens_that_were_drafts(plain, drafting):
    history, before = plain.encode(PROMPTS[0]), 0
    for turn in range(3):
        # In this order: what is made at the first use of a model counts as a change of every model.
        (expected,) = plain.generate([history], greedy(35))
        (found,) = drafting.generate([history], greedy(35))
        assert found.token_ids == expected.token_ids
        # All pages of the turn before, but for what its last step filled.
        assert turn == 0 or found.cached_tokens >= before - 16 - drafting.engine.strategy.drafts
        before = len(history) + 35
        history = history + list(found.token_ids) + [5 + turn, 9]


def test_a_second_model_that_has_read_along_drafts_as_well_where_pages_were_found():
    """The model drafts for itself, so that every draft is right, if the second one has read all that the first has."""
    llm = make("draft_model")
    prompt = llm.encode(COPIED * 3)
    for _ in range(2):
        (request,) = run(llm, [prompt], greedy(30))
        assert request.accepted == request.drafted >= 20
    assert request.cached_tokens >= 16
    # It reads on its own what the model went on with alone.
    llm.engine.strategy.row_cost = 1e9
    with llm.session() as session:
        request = session.add(prompt, greedy(60))
        while len(request.answer) < 30:
            session.step()
        assert request.drafted == 0
        llm.engine.strategy.row_cost = 0.0
        while session.unfinished:
            session.step()
    assert request.accepted == request.drafted >= 20


def test_a_second_model_reads_along_what_is_scored():
    llm = make("draft_model")
    prompt = llm.encode(COPIED * 3)
    llm.score([prompt], [[9]])
    (request,) = run(llm, [prompt], greedy(30))
    assert request.cached_tokens >= 16
    assert request.accepted == request.drafted >= 20


@pytest.mark.parametrize("strategy", ("prompt_lookup", "draft_model"))
def test_ranks_draft_the_same(tmp_path, strategy):
    write_checkpoint(tmp_path / "one")
    prompts = [[3, 4, 5] * 5, [7, 8] * 9 + [1]]

    def work(_):
        llm = make(strategy, tmp_path / "one", tensor_parallel_size=2)
        requests = run(llm, prompts, greedy(16))
        return [(tuple(r.answer), r.drafted, r.accepted) for r in requests]

    first, second = simulate(2, work)
    assert first == second and sum(accepted for *_, accepted in first) > 0
    assert [answer for answer, *_ in first] == answers(
        LLM(tmp_path / "one", dtype="float32"), prompts, greedy(16)
    )


SCHEMA = {"type": "object", "properties": {"a": {"enum": ["cat cat cat", "dog"]}, "b": {"type": "boolean"}}}


@pytest.mark.parametrize("settings", ({}, {"temperature": 1.5, "seed": 1}), ids=str)
@pytest.mark.parametrize(
    "follows", ({"json_schema": {**SCHEMA, "required": ["a", "b"]}}, {"regex": r"(cat ){5,9}(mat)?!"})
)
def test_a_grammar_allows_and_refuses_the_same_with_drafts(plain, drafting, follows, settings):
    pytest.importorskip("llguidance")
    prompts = [
        PROMPTS[0],
        '{"a": "cat cat cat", "b": true}\n{"a": "cat cat cat", "b": true}\n',
        "cat cat cat cat",
    ]
    params = SamplingParams(max_tokens=60, **follows, **settings)
    expected = plain.generate(prompts, params)
    found = drafting.generate(prompts, params)
    assert [f.token_ids for f in found] == [e.token_ids for e in expected]
    assert [f.finish_reason for f in found] == [e.finish_reason for e in expected]
    (request,) = _followed(drafting, prompts[1], params)
    assert request.drafted > 0
    if "json_schema" in follows and found[1].finish_reason == "stop":
        json.loads(found[1].text)


def _followed(llm, prompt, params):
    with llm.session() as session:
        requests = [session.add(llm.encode(prompt), params)]
        while session.unfinished:
            session.step()
    return requests


def test_drafts_that_are_never_right_become_rare_and_are_tried_again(plain):
    class Wrong(PromptLookup):
        def promise(self, request):
            return self.drafts

        def propose(self, requests):
            return [[0] * self.drafts for _ in requests]

    llm = LLM(dtype="float32")
    engine = llm.engine
    engine.strategy = engine.runner.strategy = Wrong(3, 4, 2)
    (request,) = run(llm, [plain.encode(PROMPTS[1])], greedy(300))
    assert tuple(request.answer) == answers(plain, [plain.encode(PROMPTS[1])], greedy(300))[0]
    assert request.accepted == 0
    # Of 299 steps; it goes on trying, a few times in a hundred steps.
    assert 3 * 6 <= request.drafted <= 3 * 60


def test_a_large_batch_drafts_only_where_nearly_all_drafts_are_right():
    strategy = PromptLookup(3, 4, 2)

    def pays(count, rate):
        requests = run_of(count, rate)
        return strategy._pays(requests)

    def run_of(count, rate):
        class Stub:
            decoding = type("", (), {"promised": 3, "acceptance": Acceptance(rate, 1.0)})

        return [Stub()] * count

    assert pays(1, 0.4) and not pays(1, 0.2)
    assert pays(4, 0.8) and not pays(4, 0.5)
    assert pays(16, 0.95) and not pays(16, 0.7)
    strategy.row_cost = 0.01
    assert pays(16, 0.4)


@pytest.mark.parametrize("longest, shortest", ((4, 2), (3, 1), (5, 5), (16, 3)))
def test_a_lookup_that_follows_a_text_finds_what_a_search_of_all_of_it_does(longest, shortest):
    odds = random.Random(longest)
    prompt, answer = [odds.randrange(3) for _ in range(12)], []
    lookup = Lookup(longest, shortest)
    found = 0
    for _ in range(120):
        text = prompt + answer
        lookup.follow(prompt, answer)
        best, most, compared = None, 0, 0
        for place in range(len(text) - 1, shortest - 1, -1):
            same = 0
            while same < min(longest, place) and text[place - same - 1] == text[-same - 1]:
                same += 1
            if same >= shortest:
                compared += 1
                if same > most and compared <= 16:
                    best, most = place, same
        expected = []
        if best is not None:
            going = list(text)
            for step in range(5):
                going.append(going[best + step])
            expected = going[len(text) :]
        assert lookup.find(5) == expected
        found += bool(expected)
        answer += [odds.randrange(3) for _ in range(odds.choice((1, 1, 4)))]
    assert found > 10
    assert len(lookup._before) == len(text)


def choose(spec):
    return choose_strategy(spec, None, {}, {}, 100, lambda: None)


@pytest.mark.parametrize(
    "spec, named",
    (
        ("prompt_lookup:drafts=0", "drafts"),
        ("prompt_lookup:drafts=16", "drafts"),
        ("prompt_lookup:longest=2,shortest=3", "shortest"),
        ("prompt_lookup:longest=17", "longest"),
        ("prompt_lookup:drafts=many", "drafts"),
        ("prompt_lookup:path=x", "prompt_lookup"),
        ("draft_model", "path"),
        ("draft_model:path=", "path"),
        ("draft_model:path=x,drafts=-1", "drafts"),
    ),
)
def test_a_setting_out_of_range_is_one_error_that_names_it(spec, named):
    with pytest.raises(ConfigError) as caught:
        choose(spec)
    assert caught.value.code == "strategy" and caught.value.tensor == named


def test_settings_that_are_left_out_are_the_usual():
    strategy = choose("prompt_lookup:drafts=5")
    assert strategy.settings == {"drafts": 5, "longest": 4, "shortest": 2}
    assert strategy.sources == {"drafts": "as asked", "longest": "the usual", "shortest": "the usual"}
    assert str(choose("draft_model:path=x")) == "draft_model, path x (as asked), drafts 3 (the usual)"


@pytest.mark.parametrize("strategy", ("prompt_lookup", "draft_model"))
def test_a_model_whose_state_cannot_be_taken_back_is_refused(tmp_path, strategy):
    write_checkpoint(tmp_path / "plain")
    hybrid(tmp_path / "hybrid", "qwen3_next")
    spec = f"draft_model:path={tmp_path / 'plain'}" if strategy == "draft_model" else strategy
    with pytest.raises(ConfigError, match=f"cannot be decoded by {strategy}: layers keep a state"):
        plan(tmp_path / "hybrid", strategy=spec)
    with pytest.raises(ConfigError, match="cannot draft: layers keep a state"):
        plan(tmp_path / "plain", strategy=f"draft_model:path={tmp_path / 'hybrid'}")


def test_a_second_model_must_know_the_same_tokens(tmp_path):
    write_checkpoint(tmp_path / "one", max_position_embeddings=64)
    write_checkpoint(tmp_path / "two", vocab_size=120, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"share their vocabulary.*of 97 tokens.*120"):
        plan(tmp_path / "one", strategy=f"draft_model:path={tmp_path / 'two'}")
    with pytest.raises(ConfigError, match="no tokenizer in"):
        plan(tmp_path / "one", strategy=f"draft_model:path={shipped_model()}")
    shutil.copytree(shipped_model(), tmp_path / "three")
    file = tmp_path / "three" / "tokenizer.json"
    described = json.loads(file.read_text())
    vocabulary = described["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="token 30"):
        plan(shipped_model(), strategy=f"draft_model:path={tmp_path / 'three'}")
    with pytest.raises(CheckpointError, match="/nowhere/at/all"):
        plan(shipped_model(), strategy="draft_model:path=/nowhere/at/all")


def test_the_plan_counts_the_second_model():
    alone = plan(shipped_model(), dtype="float32")
    both = plan(shipped_model(), dtype="float32", strategy=f"draft_model:path={shipped_model()}")
    for name in ("weight_bytes", "kv_cache_bytes_per_token"):
        assert both.totals[name] == 2 * alone.totals[name]
        assert both.strategy["draft"][name] == alone.totals[name]
    assert both.totals["peak_load_bytes"] == alone.totals["weight_bytes"] + alone.totals["peak_load_bytes"]
    assert both.kv_cache["bytes"] == 2 * alone.kv_cache["bytes"]
    assert sum(group["count"] for group in both.strategy["draft"]["layers"]) == len(alone.layers)
    assert "drafts by" in str(both) and json.dumps(both.to_dict())
