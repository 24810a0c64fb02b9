"""Sixty-four requests at random times: each answers as it does alone, whatever the pages, the pieces and the cache.

`python benchmarks/crowd.py` runs more of it: every way, other models, other strategies.
"""

from __future__ import annotations

import pytest

from pymllm import LLM, SamplingParams

from ..checkpoints import write_checkpoint
from ..generic import zoo
from .crowd import (
    WAYS,
    Answer,
    Asked,
    Way,
    alone,
    check_against_whole_forwards,
    compare,
    make_crowd,
    one_by_one,
    play,
    rounds,
)

# What decides which numbers a step has: an own page with sliding windows, experts, transformers' class, states.
TYPES = ("gemma2", "qwen3_moe", "stablelm", "qwen3_5_text")


def load(folder=None, **settings):
    return LLM(folder, dtype="float32", compute="exact", progress=False, **settings)


def write(model_type, folder):
    if model_type == "qwen3_5_text":
        write_checkpoint(folder, model_type, max_position_embeddings=256)
    else:
        zoo.small(model_type).model().save_pretrained(folder)


def run(llm, made, ways, **options):
    """Run a crowd in several ways.  Returns how often requests were preempted, and how many tokens they shared."""
    crowd, expected = [asked for asked, _ in made], [answer for _, answer in made]
    totals = [0, 0]
    for seed, way in enumerate(ways):
        requests = play(llm, crowd, way, seed, **options)
        compare(requests, expected, exact=not rounds(llm) or "step" in options)
        totals[0] += sum(request.preemptions for request in requests)
        totals[1] += sum(request.cached_tokens for request in requests)
        assert way.reuse or not any(request.cached_tokens for request in requests)
    return totals


def test_sixty_four_requests_answer_as_each_does_alone():
    llm = load()
    made = make_crowd(llm, 64)
    assert check_against_whole_forwards(llm, made) > 32
    preempted, shared = run(llm, made, (WAYS[0], WAYS[3], WAYS[6], WAYS[7]))
    assert preempted > 5 and shared > 2000


@pytest.mark.parametrize("model_type", TYPES)
def test_every_kind_of_model_answers_as_each_request_does_alone(tmp_path, model_type):
    write(model_type, tmp_path)
    llm = load(tmp_path)
    made = make_crowd(llm, 20)
    assert check_against_whole_forwards(llm, made) > 8
    preempted, shared = run(llm, made, (WAYS[4], WAYS[6], Way(21, tight=True)))
    assert preempted + shared > 0


@pytest.mark.parametrize("kv_cache", ("bfloat16", "int8", "fp8", "fp8:scale=token"))
def test_with_every_kv_cache(tmp_path, kv_cache):
    """Exactly, where steps run token by token; and as good as that where they do not."""
    write("gemma2", tmp_path)
    llm = load(tmp_path, kv_cache=kv_cache)
    made = make_crowd(llm, 10)
    assert rounds(llm)
    crowd = [asked for asked, _ in made]
    slowly = play(llm, crowd, Way(reuse=False), step=one_by_one(llm))
    expected = [Answer(tuple(request.answer), "", request.finish_reason or "") for request in slowly]
    exactly = list(zip(crowd, expected, strict=True))
    preempted, shared = run(llm, exactly, (Way(7, tight=True),), step=one_by_one(llm))
    assert preempted + shared > 0
    run(llm, made, (WAYS[0], WAYS[3]))


def test_a_wrong_answer_is_seen():
    """The crowd's own checks: another answer, and a page that is lost."""
    llm = load()
    asked = Asked((50, 60, 70), SamplingParams(max_tokens=4))
    right = alone(llm, asked)
    wrong = Answer((*right.tokens[:-1], right.tokens[-1] ^ 1), "", right.reason, (9.0,) * 4)
    (request,) = play(llm, [asked])
    with pytest.raises(AssertionError):
        compare([request], [wrong])
    with pytest.raises(AssertionError):
        compare([request], [wrong], exact=False)
    assert compare([request], [Answer(wrong.tokens, "", "length", (0.1,) * 4)], exact=False) == [(0, 3)]
    inner = llm.engine.strategy.end_run

    def lose(request):
        inner(request)
        request.pages.pop()

    llm.engine.strategy.end_run = lose
    with pytest.raises(AssertionError):
        play(llm, [asked])
