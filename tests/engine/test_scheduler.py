"""Which requests a step runs: long prompts in pieces, answers beside them, pages as they are needed, and lost again."""

from __future__ import annotations

import pytest
import torch

from pymllm import LLM
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.outputs import GenerationOutputs
from pymllm.engine.request import Request
from pymllm.engine.scheduler import Scheduler
from pymllm.kernels.attention import PAGE_SIZE

from ..checkpoints import write_checkpoint
from .answers import answers, greedy

PROMPTS = [[1 + (7 * i + j) % 250 for j in range(3 + 29 * i)] for i in range(5)]  # 3 to 119 tokens


@pytest.fixture(scope="module")
def alone():
    """Each prompt's answer from a model that has nothing else to do."""
    llm = LLM(dtype="float32")
    return [answers(llm, [prompt], greedy(40))[0] for prompt in PROMPTS]


def with_pages(llm, count):
    llm.engine.cache = PagedKVCache(llm.model, count, torch.device("cpu"))
    return llm


@pytest.mark.parametrize("step_tokens", (1, 7, 16, 64))
def test_prompts_read_in_pieces_have_the_same_answers(alone, step_tokens):
    llm = LLM(dtype="float32")
    llm.engine.scheduler.step_tokens = step_tokens
    recorded = GenerationOutputs(len(PROMPTS))
    assert answers(llm, PROMPTS, greedy(40), outputs=recorded) == alone
    assert recorded.prefill_tokens == sum(map(len, PROMPTS))
    assert recorded.generated_tokens == 40 * len(PROMPTS)
    assert len(recorded.trajectories[4].trajectory) >= 119 // step_tokens + 39


@pytest.mark.parametrize("method", ("int8", "fp8"))
def test_a_quantised_cache_gives_a_divided_prompt_the_same_answer(method):
    llm = LLM(dtype="float32", kv_cache=method)
    expected = answers(llm, PROMPTS[4:], greedy(24))
    llm.engine.scheduler.step_tokens = 11
    assert answers(llm, PROMPTS[4:], greedy(24)) == expected


def test_answers_go_on_while_a_long_prompt_is_read():
    llm = LLM(dtype="float32")
    llm.engine.scheduler.step_tokens = 16
    with llm.session() as session:
        short = session.add([1, 2, 3], greedy(30))
        session.step()
        long = session.add([5] * 100, greedy(4))
        while not long.answer:
            before = len(short.answer)
            session.step()
            assert len(short.answer) == before + 1
            assert len(short.running_sequence) + len(long.running_sequence) <= 16
        assert len(short.answer) >= 7


@pytest.mark.parametrize("pages", (11, 14, 20))
def test_requests_that_lose_their_pages_answer_as_if_they_had_not(alone, pages):
    llm = with_pages(LLM(dtype="float32"), pages)  # 37 pages would hold all of them to their ends
    with llm.session() as session:
        requests = [session.add(prompt, greedy(40)) for prompt in PROMPTS]
        while session.unfinished:
            session.step()
    assert [tuple(request.answer) for request in requests] == alone
    assert requests[0].preemptions == 0 < sum(request.preemptions for request in requests)
    assert sorted(llm.engine.cache.free) == list(range(pages))


def test_sampled_answers_survive_preemption_too():
    prompts, params = [[3], [4], [5], [6]], [greedy(60, temperature=0.8, seed=s) for s in range(4)]
    expected = answers(LLM(dtype="float32"), prompts, params)
    assert answers(with_pages(LLM(dtype="float32"), 8), prompts, params) == expected


def test_a_request_that_fills_the_whole_cache_ends_at_its_length():
    llm = with_pages(LLM(dtype="float32"), 3)
    (answer,) = answers(llm, [[5] * 20], greedy(1000))
    assert len(answer) == 3 * PAGE_SIZE - 20
    assert len(llm.engine.cache.free) == 3


def test_the_first_to_come_are_the_first_to_run():
    llm = LLM(dtype="float32")
    llm.engine.scheduler.max_requests = 2
    with llm.session() as session:
        requests = [session.add([9, 8, 7], greedy(3)) for _ in range(5)]
        order = []
        while session.unfinished:
            order.append([requests.index(request) for request, _ in session.step()])
    assert order == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4]] * 3


def test_models_whose_keys_depend_on_the_length_are_neither_divided_nor_preempted(tmp_path):
    write_checkpoint(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    llm = LLM(tmp_path, dtype="float32")
    assert llm.model.keys_depend_on_length
    scheduler = with_pages(llm, 12).engine.scheduler
    scheduler.step_tokens = 4
    with llm.session() as session:
        first, second = session.add([5] * 30, greedy(60)), session.add([6] * 30, greedy(100))
        session.step()
        assert len(first.running_sequence) == 30 and len(first.pages) == 6
        assert second in scheduler.waiting  # 9 of 6 pages


def test_a_failing_request_of_a_batch_is_named_by_its_own_error(monkeypatch):
    llm = LLM(dtype="float32")
    inner = llm.engine.runner.step

    def step(batch, cache):
        if any(request.prompt[0] == 13 for request in batch):
            raise ZeroDivisionError("oops")
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    with llm.session() as session:
        requests = [session.add([first, 2], greedy(5)) for first in (12, 13, 14)]
        while session.unfinished:
            session.step()
    assert [len(request.answer) for request in requests] == [5, 0, 5]
    assert isinstance(requests[1].error, ZeroDivisionError) and requests[0].error is requests[2].error is None
    with pytest.raises(ZeroDivisionError):
        llm.generate([[12, 2], [13, 2]], greedy(2))
    assert llm.engine.idle and len(llm.engine.cache.free) == llm.engine.cache.num_pages


def test_greedy_and_sampled_requests_share_a_batch():
    llm = LLM(dtype="float32")
    params = [
        greedy(12),
        greedy(12, temperature=1.0, seed=1),
        greedy(12, logprobs=1),
        greedy(12, top_k=2, temperature=2.0, seed=5),
    ]
    prompts = [PROMPTS[1]] * 4
    together = llm.generate(prompts, params)
    assert [o.token_ids for o in together] == [llm.generate(prompts[:1], p)[0].token_ids for p in params]
    assert len(together[2].logprobs) == 12 and together[0].logprobs is None


def test_pages_are_never_handed_out_twice():
    """Random arrivals and ends over a small cache: what is free and what is held are all the pages, once."""
    generator = torch.Generator().manual_seed(0)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    cache = PagedKVCache(torch.nn.Module(), 16, torch.device("cpu"))
    scheduler = Scheduler(cache, whole=False)
    scheduler.step_tokens, scheduler.max_requests = 24, 6
    for _ in range(600):
        if number(0, 4) == 0:
            prompt = [0] * number(1, 90)
            scheduler.waiting.append(
                Request(prompt, greedy(50), min(len(prompt) + number(1, 60), 16 * PAGE_SIZE))
            )
        step = scheduler.schedule()
        assert bool(step) or not (scheduler.running or scheduler.waiting), (
            "a step without requests though some wait"
        )
        assert sum(len(request.running_sequence) for request in step) <= 24
        held = [page for request in scheduler.running for page in request.pages]
        assert sorted(held + cache.free) == list(range(16))
        for request in step:
            assert request in scheduler.running
            assert request.computed + len(request.running_sequence) <= len(request.pages) * PAGE_SIZE
            scheduler.strategy.end_run(request)
            if request.rows:
                request.add_token(0, frozenset())
            if request.finish_reason or number(0, 60) == 0:
                scheduler.remove(request)
