"""States of requests beside the KV cache: every answer is that of the request alone, and every slot comes back."""

from __future__ import annotations

import random

import pytest
import torch

from pymllm import LLM
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.kv_memory import choose_cache_size
from pymllm.engine.states import StatePool
from pymllm.errors import ConfigError

from ..checkpoints import write_checkpoint
from .answers import answers, greedy
from .trailing import Trailing, trails, with_states

ODDS = random.Random(5)
PROMPTS = [[ODDS.randrange(97) for _ in range(ODDS.randint(1, 80))] for _ in range(64)]
LENGTHS = [ODDS.randint(1, 24) for _ in PROMPTS]
ARRIVALS = [ODDS.randint(0, 30) for _ in PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trailing")
    write_checkpoint(path, max_position_embeddings=512)
    return path


def make(folder, *, pages=64, slots=9, remembered=16, reuse=True, step_tokens=1024) -> LLM:
    llm = with_states(LLM(folder, dtype="float32", prefix_reuse=reuse))
    llm.engine.cache = PagedKVCache(llm.model, pages, torch.device("cpu"))
    llm.engine.state_slots, llm.engine.remembered_states = slots, remembered
    llm.engine.scheduler.step_tokens = step_tokens
    return llm


@pytest.fixture(scope="module")
def alone(folder):
    """Each answer of a request that runs by itself, without a cache and without states: all its tokens every time."""
    llm = with_states(LLM(folder, dtype="float32"))
    found = []
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        tokens = list(prompt)
        for _ in range(length):
            tokens.append(int(llm.logits(tokens)[-1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def run(llm, *, each_step=lambda session, requests: None):
    """Run all prompts, each from its time on.  Returns the requests."""
    requests, step = [], 0
    order = sorted(range(len(PROMPTS)), key=ARRIVALS.__getitem__)
    with llm.session() as session:
        while len(requests) < len(PROMPTS) or session.unfinished:
            while len(requests) < len(order) and ARRIVALS[order[len(requests)]] <= step:
                index = order[len(requests)]
                requests.append(session.add(PROMPTS[index], greedy(LENGTHS[index]), req_id=index))
            each_step(session, requests)
            session.step()
            step += 1
            running = [request.state_slot for request in llm.engine.scheduler.running]
            assert None not in running and len(set(running)) == len(running)
            assert all(request.state_slot is None for request in llm.engine.scheduler.waiting)
    return requests


def check_free(llm):
    engine = llm.engine
    assert sorted(engine.cache.free) == list(range(engine.cache.num_pages))
    assert sorted(engine.states._free) == list(range(engine.states.count))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pages": 12},
        {"pages": 9, "step_tokens": 21},
        {"pages": 12, "reuse": False},
        {"step_tokens": 16, "remembered": 3},
        {"slots": 64, "pages": 256, "step_tokens": 100},
    ],
    ids=str,
)
def test_answers_at_any_time_are_those_of_each_request_alone(folder, alone, settings):
    llm = make(folder, **settings)
    requests = run(llm)
    assert {request.req_id: request.answer for request in requests} == dict(enumerate(alone))
    check_free(llm)
    assert len(llm.engine.scheduler.running) == 0
    if "pages" in settings and settings["pages"] < 64:
        assert sum(request.preemptions for request in requests) > 0


def test_requests_wait_for_a_slot_and_every_slot_is_told_to_the_layers(folder):
    llm = make(folder, slots=2)
    with llm.session() as session:
        requests = [session.add([9, 8, 7], greedy(3)) for _ in range(5)]
        order = []
        while session.unfinished:
            order.append([requests.index(request) for request, _ in session.step()])
    assert order == [[0, 1]] * 3 + [[2, 3]] * 3 + [[4]] * 3
    assert all(sorted(layer.freed) == [0, 0, 0, 1, 1] for layer in trails(llm))


@pytest.mark.parametrize("layer", (0, 1))
@pytest.mark.parametrize("pages", (12, 64))
def test_a_step_that_fails_leaves_no_mark_on_the_others(folder, alone, layer, pages):
    llm = make(folder, pages=pages, step_tokens=23)
    broken = []

    def break_some(step):
        broken.append(step.num_reqs)
        return step.num_reqs > 1 and len(broken) % 5 == 0

    trails(llm)[layer].break_if = break_some
    requests = run(llm)
    assert {request.req_id: request.answer for request in requests} == dict(enumerate(alone))
    assert len(broken) > 100
    check_free(llm)


def test_a_request_that_is_to_blame_fails_alone_and_nobody_goes_on_from_its_state(folder, alone):
    llm, guilty = make(folder, pages=40), {3, 21, 40}
    inner = llm.engine.runner.step

    def step(requests, cache):
        logits = inner(requests, cache)
        if any(request.req_id in guilty and request.answer for request in requests):
            raise RuntimeError("to blame")
        return logits

    llm.engine.runner.step = step
    requests = run(llm)
    for request in requests:
        if request.req_id in guilty and LENGTHS[request.req_id] > 1:
            assert str(request.error) == "to blame"
        else:
            assert request.error is None and request.answer == alone[request.req_id]
    check_free(llm)


def test_aborted_requests_give_their_slots_back(folder, alone):
    llm, odds, aborted = make(folder, pages=20), random.Random(3), []

    def abort_some(session, requests):
        if session.unfinished and odds.random() < 0.3:
            request = odds.choice(session.unfinished)
            aborted.append(request.req_id)
            session.abort(request)

    requests = run(llm, each_step=abort_some)
    assert len(aborted) > 8
    for request in requests:
        if request.req_id not in aborted:
            assert request.answer == alone[request.req_id]
    check_free(llm)


# What is remembered


HISTORY = [(7 * i * i + 3 * i) % 97 for i in range(130)]


def test_the_next_turn_of_a_chat_reads_only_what_is_new(folder):
    llm, plain = make(folder), make(folder, reuse=False)
    first, later = HISTORY[:100], [5, 4, 3, 2]
    (one,) = llm.generate([first], greedy(30))
    assert one.token_ids == answers(plain, [first], greedy(30))[0]
    turn = [*first, *one.token_ids, *later]
    (two,) = llm.generate([turn], greedy(20))
    assert two.token_ids == answers(plain, [turn], greedy(20))[0]
    assert two.cached_tokens == 128  # 129 tokens have been run, to the end of a page
    other = [*first[:95], *later]  # the prompt's end was another, as a template may have it
    (three,) = llm.generate([other], greedy(20))
    assert three.token_ids == answers(plain, [other], greedy(20))[0]
    assert three.cached_tokens == 80


def test_pages_without_the_state_at_their_end_are_of_no_use(folder):
    llm = make(folder)
    llm.generate([HISTORY], greedy(3))
    (answer,) = llm.generate([[*HISTORY[:70], 1, 2, 3]], greedy(5))
    assert answer.cached_tokens == 0
    assert [answer.token_ids] == answers(make(folder, reuse=False), [[*HISTORY[:70], 1, 2, 3]], greedy(5))


def test_no_more_states_are_remembered_than_there_is_room_for_and_the_oldest_go(folder):
    llm = make(folder, remembered=2, pages=100)
    prompts = [[i, *HISTORY] for i in range(4)]
    for prompt in prompts:
        llm.generate([prompt], greedy(2))
        assert llm.engine.states.remembered <= 2
    cached = [llm.generate([prompt], greedy(2))[0].cached_tokens for prompt in reversed(prompts)]
    assert cached == [112, 112, 0, 0]


def test_a_changed_model_goes_on_from_no_state_of_before(folder):
    llm = make(folder)
    (before,) = answers(llm, [HISTORY])
    weight = llm.model.model.layers[0].mlp.inner.down_proj
    handle = weight.register_forward_hook(lambda module, args, output: -output)
    (answer,) = llm.generate([HISTORY], greedy(40))
    assert answer.cached_tokens == 0 and answer.token_ids != before
    handle.remove()


def test_a_request_that_fails_is_not_remembered(folder):
    llm = make(folder)
    inner = llm.engine.runner.step

    def step(requests, cache):
        if requests[0].answer:
            raise RuntimeError("broken on purpose")
        return inner(requests, cache)

    llm.engine.runner.step = step
    with pytest.raises(RuntimeError, match="on purpose"):
        llm.generate([HISTORY], greedy(3))
    assert llm.engine.states.remembered == 0
    check_free(llm)


def test_what_cannot_be_copied_is_neither_remembered_nor_recorded(folder, monkeypatch):
    monkeypatch.setattr(Trailing, "copies_states", False)
    monkeypatch.setattr(Trailing, "save_states", None)
    llm = make(folder)
    first = answers(llm, [HISTORY])
    (again,) = llm.generate([HISTORY], greedy(40))
    assert again.cached_tokens == 0 and [again.token_ids] == first
    assert llm.engine.runner.eager_reason == "a layer keeps states that cannot be copied"


# Steps that are replayed


def test_tapes_and_python_give_the_same_answers(folder, monkeypatch):
    from pymllm.kernels.native.extension import native_available

    expected = answers(make(folder, reuse=False), PROMPTS[:5])
    llm = make(folder, reuse=False)
    assert [answers(llm, PROMPTS[:5]) for _ in range(2)] == [expected] * 2
    replays = {batch.replay is not None for batch in llm.engine.runner._decoding.values()}
    assert replays == {native_available()}
    # An odd number of passes over the same state would show in the answers of Python alone.
    monkeypatch.setattr("pymllm.engine.states.MAX_COPIED_BYTES", 0)
    monkeypatch.setattr("pymllm.engine.runner.MAX_COPIED_BYTES", 0)
    eager = make(folder, reuse=False)
    assert answers(eager, PROMPTS[:5]) == expected
    refused = {batch.refused for batch in eager.engine.runner._decoding.values()}
    assert refused == {"the states of its requests take 0 MiB"}


def test_a_capture_warms_up_on_nobody_s_state(folder):
    """A stand-in for a graph on a CPU: it runs the step twice to warm up, and has more rows than requests."""
    expected = answers(make(folder), PROMPTS[:3])
    llm, slots = make(folder), []

    def capture(forward):
        for _ in range(2):
            slots.append(list(llm.engine.runner._decoding.values())[-1].step.state_slots.tolist())
            forward()
        return forward

    assert llm.engine.scheduler.states is llm.engine.runner.states
    llm.engine.runner.capture = capture
    assert answers(llm, PROMPTS[:3]) == expected
    assert slots and all(set(row) == {llm.engine.states.scratch} for row in slots)


# How many there are


def test_memory_is_shared_between_pages_and_states():
    size = choose_cache_size(4096, 1000, 10**9, state_bytes=10**6)
    assert (size.requests, size.remembered_states) == (64, 16)
    assert (
        size.state_bytes == 81 * 10**6
        and size.tokens == 16384 // 16 * 16 == 16384
        and size.bytes <= 169 * 10**6
    )
    size = choose_cache_size(4096, 1000, 10**8, state_bytes=10**6)  # 25 MB in all
    assert (size.requests, size.remembered_states, size.state_bytes) == (8, 3, 12 * 10**6)
    assert size.tokens == 12_992 and size.bytes + size.state_bytes <= 25 * 10**6
    size = choose_cache_size(4096, 1000, None, kv_memory="10MB", max_model_len=4096, state_bytes=10**6)
    assert size.requests == 3 and size.max_model_len == 4096
    assert size.bytes + size.state_bytes <= 10**7
    assert choose_cache_size(4096, 1000, 10**9).state_bytes == 0


def test_a_memory_that_holds_no_request_s_state_is_refused_with_the_numbers():
    for token_bytes in (0, 1000):
        with pytest.raises(ConfigError, match=r"1\.00 MB.*beside 2\.00 MB of states"):
            choose_cache_size(4096, token_bytes, None, kv_memory="1MB", state_bytes=10**6)


def test_the_lowest_slots_go_first():
    pool = StatePool([], 4, torch.device("cpu"))
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.release(1)
    pool.release(0)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 3] and pool.available == 0
    assert pool.scratch == 4
