"""Log-likelihoods: those of transformers' log_softmax, whatever is shared, cut, windowed or beside them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from pymllm import LLM, SamplingParams
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.scoring import PARAMS, PairEncoder, ScoredText
from pymllm.errors import KernelError, RequestError

from ..adapters.handwritten import adapter_for_shipped
from ..checkpoints import HYBRID, write_checkpoint
from .test_llm import dequantized_model
from .test_prefix_reuse import check_pages, fresh

PROMPT = "def read_lines(path):\n    return"
CHOICES = [" open(path)", " [line for line in path]", " x", "\n", " open(path).read()"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype="float32")


def expected(model, ids, first):
    """Compute log-probabilities of ids[first:] and whether each is the likeliest, in one forward of transformers."""
    with torch.no_grad():
        exact = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    rows = exact[first - 1 : len(ids) - 1]
    tokens = torch.tensor(ids[first:])
    return rows.gather(1, tokens[:, None])[:, 0].tolist(), (rows.argmax(-1) == tokens).tolist()


def check(score, model, ids, first):
    values, greedy = expected(model, ids, first)
    assert (score.prompt_token_ids, score.token_ids) == (tuple(ids[:first]), tuple(ids[first:]))
    assert score.logprobs == pytest.approx(values, abs=1e-4)
    assert score.logprob == pytest.approx(sum(values), abs=1e-4 * len(values))
    assert list(score.greedy) == greedy and score.is_greedy == all(greedy)
    assert score.num_tokens == len(values)
    assert score.perplexity == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-3)


def test_choices_of_a_prompt_score_as_transformers_scores_them(llm):
    model, before = dequantized_model(), len(llm.encode(PROMPT))
    for score, choice in zip(llm.score(PROMPT, CHOICES), CHOICES, strict=True):
        check(score, model, llm.encode(PROMPT + choice), before)


def test_whole_texts_score_every_token_after_the_first(llm):
    texts = [PROMPT + CHOICES[0], [5, 6, 7], "import os\n" * 30]
    for score, text in zip(llm.score(texts), texts, strict=True):
        check(score, dequantized_model(), llm.encode(text), 1)


def test_greedy_continuations_are_told_from_others(llm):
    answer = llm.generate(PROMPT, SamplingParams(max_tokens=6, ignore_eos=True))[0]
    prompt, ids = list(answer.prompt_token_ids), list(answer.token_ids)
    other = [*ids[:3], (ids[3] + 1) % 4096, *ids[4:]]
    first, second = llm.score([prompt, prompt], [ids, other])
    assert first.is_greedy and all(first.greedy)
    assert not second.is_greedy and second.greedy[:4] == (True, True, True, False)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_a_random_model_scores_as_in_transformers_beside_others_and_in_pieces(tmp_path, family):
    settings = HYBRID if family == "qwen3_5_text" else {}
    write_checkpoint(tmp_path, family, max_position_embeddings=256, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    llm, odds = LLM(tmp_path, dtype="float32", progress=False), random.Random(3)
    shared = [odds.randrange(97) for _ in range(100)]
    pairs = []
    for length in (100, 37, 100, 16, 17, 100, 1, 33):
        pairs.append((shared[:length], [odds.randrange(97) for _ in range(odds.choice((1, 2, 15, 16, 40)))]))
    llm.engine.scheduler.step_tokens = 23
    scores = llm.score([p for p, _ in pairs], [c for _, c in pairs])
    for score, (prompt, after) in zip(scores, pairs, strict=True):
        check(score, model, prompt + after, len(prompt))
    assert sum(score.cached_tokens for score in scores) > 100
    again = llm.score([p for p, _ in pairs], [c for _, c in pairs])
    for one, other in zip(scores, again, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_a_prompt_that_choices_share_is_read_once(llm):
    fresh(llm)
    prompt = [1 + i % 200 for i in range(160)]
    ran, inner = [], llm.engine.runner.step

    def step(batch, cache):
        ran.extend(len(request.running_sequence) for request in batch)
        return inner(batch, cache)

    llm.engine.runner.step = step
    try:
        scores = llm.score([prompt] * 4 + [prompt], [[5], [6], [7, 8], [9], [5]])
    finally:
        del llm.engine.runner.step
    # The page of the prompt's last token has what is scored after it.
    assert [score.cached_tokens for score in scores].count(0) == 1
    assert sorted(score.cached_tokens for score in scores)[1:] == [144] * 4
    assert sum(ran) == 160 + 4 * 16 + 1
    check_pages(llm.engine)
    fresh(llm)


def test_a_score_whose_pages_are_taken_away_goes_on_where_it_was(llm):
    prompt, after = list(range(10, 40)), list(range(50, 80))
    (expected_score,) = llm.score([prompt], [after])
    fresh(llm, pages=7, step_tokens=3)
    try:
        with llm.session() as session:
            answered = session.add(list(range(100, 130)), SamplingParams(max_tokens=25, ignore_eos=True))
            scored = session.add([*prompt, *after], PARAMS, first_scored=len(prompt))
            while session.unfinished:
                session.step()
                check_pages(llm.engine)
        assert scored.preemptions == 1 and answered.preemptions == 0 and len(answered.answer) == 25
        found = [entry.logprob for entry in scored.prompt_logprobs[1:]]
        assert found == pytest.approx(expected_score.logprobs, abs=1e-4)
        assert scored.output().metrics.preemptions == 1 and scored.output().metrics.ttft is None
    finally:
        fresh(llm)


def test_a_text_longer_than_the_context_is_read_in_windows(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "max_length", 40)
    ids = [1 + (7 * i * i) % 250 for i in range(101)]
    score = llm.score([ids])[0]
    model = dequantized_model()
    values = [*expected(model, ids[:41], 1)[0]]
    values += expected(model, ids[40:81], 1)[0]
    values += expected(model, ids[60:101], 21)[0]
    assert score.token_ids == tuple(ids[1:])
    assert score.logprobs == pytest.approx(values, abs=1e-4)
    assert len(llm.score([ids[:41]])[0].logprobs) == 40
    with pytest.raises(RequestError, match=r"at most 41 tokens.*found 42"):
        llm.score([ids[:30]], [ids[30:42]])
    assert len(llm.score([ids[:30]], [ids[30:41]])[0].logprobs) == 11


@pytest.mark.parametrize(
    ("count", "first", "longest"), [(2, 1, 5), (40, 1, 7), (41, 3, 7), (8, 7, 7), (30, 1, 1)]
)
def test_windows_score_every_token_once_with_all_the_context_that_fits(count, first, longest):
    parts = list(ScoredText(tuple(range(count)), first, True).windows(longest))
    assert [token for part in parts for token in part.ids[part.first :]] == list(range(first, count))
    assert all(len(part.ids) <= longest + 1 and part.first >= 1 for part in parts)
    # All but the first run as many tokens as fit.
    assert all(len(part.ids) == longest + 1 for part in parts[1:])
    assert all(part.ids == tuple(range(part.ids[0], part.ids[-1] + 1)) for part in parts)


def test_boundaries_lie_where_the_joint_text_has_them(llm):
    encode = PairEncoder(llm.tokenizer, llm.encode)
    joint = tuple(llm.encode("x = 1"))
    before = len(llm.encode("x ="))
    for prompt, after in [("x =", " 1"), ("x = ", "1")]:
        (text,) = encode([(prompt, after)])
        assert (text.ids, text.first) == (joint, before)
    # "re" + "turn" is one token: the continuation is scored with the letters before it.
    (text,) = encode([("x re", "turn")])
    assert text.ids == tuple(llm.encode("x return")) and text.first == len(text.ids) - 1
    end = llm.tokenizer.encode("<|endoftext|>") if not llm.encode("") else llm.encode("")
    (text,) = encode([("", "x = 1")])
    assert text.ids[1:] == joint and text.first == 1 and [text.ids[0]] == end
    (text,) = encode([([5, 6], " 1")])
    assert text.ids == (5, 6, *llm.tokenizer.encode(" 1")) and text.first == 2


def test_a_million_requests_would_not_wait_at_the_same_time(llm, monkeypatch):
    monkeypatch.setattr(llm.engine.scheduler, "max_requests", 4)
    inner, waiting = llm.engine.step, []

    def step():
        waiting.append(len(llm.engine.scheduler.waiting) + len(llm.engine.scheduler.running))
        return inner()

    monkeypatch.setattr(llm.engine, "step", step)
    assert len(llm.score([[1, 2, i] for i in range(60)])) == 60
    assert max(waiting) <= 8


def test_what_cannot_be_scored_is_named(llm):
    for prompts, after, where in [
        ("", "", "continuations"),
        (["x", "y"], ["1", ""], r"continuations\[1\]"),
        (["x = 1", [5]], None, r"prompts\[1\]"),
        (["x", "y"], ["1"], "continuations"),
        ("x", [[99999]], "prompt"),
        (["x", 5.0], None, "prompt"),
    ]:
        with pytest.raises(RequestError, match=where):
            llm.score(prompts, after)
    with pytest.raises(RequestError, match="adapter"):
        llm.score("x", "y", adapter="none")
    assert llm.score([], []) == [] and llm.engine.idle


def test_logits_that_are_no_numbers_are_an_error_and_the_engine_goes_on(llm, monkeypatch):
    inner = llm.model.compute_logits
    monkeypatch.setattr(
        llm.model, "compute_logits", lambda *a, **k: torch.full_like(inner(*a, **k), torch.nan)
    )
    with pytest.raises(KernelError, match="not numbers"):
        llm.score("x", " = 1")
    monkeypatch.undo()
    assert llm.engine.idle
    assert len(llm.score("x", " = 1")[0].logprobs) == 2


def test_a_single_page_model_needs_no_room_for_an_answer():
    llm = LLM(dtype="float32", max_model_len=16, progress=False)
    llm.engine.cache = PagedKVCache(llm.model, 1, torch.device("cpu"))
    assert len(llm.score([list(range(1, 18))])[0].logprobs) == 16


def test_an_adapter_s_scores_are_its_own(llm, tmp_path):
    adapter_for_shipped(tmp_path, llm)
    llm.load_adapter("odd", tmp_path)
    ids = [1 + i % 200 for i in range(60)]
    try:
        plain, odd = (llm.score([ids[:40]], [ids[40:]], adapter=name)[0] for name in (None, "odd"))
        exact = llm.logits(ids, adapter="odd").double().log_softmax(-1)
        assert odd.logprobs == pytest.approx(
            [float(exact[at - 1, ids[at]]) for at in range(40, 60)], abs=1e-4
        )
        assert (
            odd.cached_tokens == 0
            and max(abs(a - b) for a, b in zip(plain.logprobs, odd.logprobs, strict=False)) > 0.1
        )
    finally:
        llm.unload_adapter("odd")


def test_prompts_and_continuations_in_tensors_and_lists_of_one(llm):
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    expected_scores = llm.score([[5, 6, 7], [5, 6, 8]], [[9], [10]])
    assert [s.token_ids for s in llm.score(ids, torch.tensor([[9], [10]]))] == [(9,), (10,)]
    assert llm.score(ids[0], [[9]])[0].logprobs == pytest.approx(expected_scores[0].logprobs, abs=1e-4)
    assert [s.prompt_token_ids for s in llm.score([[5, 6]], [[7], [8, 9]])] == [(5, 6), (5, 6)]
    assert [s.num_tokens for s in llm.score(["x = 1", [5, 6, 7]], [None, [9]])] == [
        len(llm.encode("x = 1")) - 1,
        1,
    ]


@pytest.mark.parametrize("block", [1, 4])
def test_a_model_that_answers_by_blocks_has_no_such_scores(block):
    llm = LLM(strategy=f"block_diffusion:block_length={block},mask_token_id=3", progress=False)
    with pytest.raises(RequestError, match="answers by blocks"):
        llm.score(PROMPT, CHOICES)
    assert llm.engine.idle
