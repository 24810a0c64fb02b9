"""Pages that several requests share: the same answers as without, less to compute, and every page accounted for."""

from __future__ import annotations

import random

import pytest
import torch

from pymllm import LLM, swap
from pymllm.engine.outputs import GenerationOutputs
from pymllm.kernels.attention import PAGE_SIZE

from ..adapters.handwritten import adapter_for_shipped
from ..checkpoints import write_checkpoint
from .answers import greedy
from .crowd import check_pages, one_by_one
from .crowd import renew as fresh

TEXT = [1 + (7 * i * i + 3 * i) % 250 for i in range(400)]


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32")


def computed(llm, prompt, params, **options):
    """Answer a prompt.  Returns the answer, and how many of its tokens were computed for it as a prompt's."""
    outputs = GenerationOutputs(1)
    (output,) = llm.generate([prompt], params, outputs=outputs, **options)
    assert outputs.cached_tokens == output.cached_tokens
    assert outputs.prefill_tokens + output.cached_tokens == len(prompt)
    return output.token_ids, outputs.prefill_tokens


def test_a_turn_of_a_chat_reads_its_own_message_and_less_than_a_page_of_what_was_before(llm):
    said, turns = {}, []
    for reuse in (True, False):
        fresh(llm, reuse=reuse)
        history, said[reuse] = [], []
        for turn in range(8):
            known, message = len(history), TEXT[40 * turn : 40 * turn + 21 + turn]
            history += message
            answer, read = computed(llm, history, greedy(13 + turn))
            history += answer
            said[reuse].append(answer)
            if reuse:
                # The last token of an answer was never run.
                turns.append((read, known + len(message) - max(known - 1, 0) // PAGE_SIZE * PAGE_SIZE))
                assert read < len(message) + PAGE_SIZE + 1
            else:
                assert read == known + len(message)
    assert said[True] == said[False]
    assert [read for read, _ in turns] == [expected for _, expected in turns]


def test_the_last_token_of_a_prompt_is_always_computed(llm):
    fresh(llm)
    for length, again in ((32, 16), (33, 1), (48, 16), (47, 15), (1, 1), (16, 16), (17, 1)):
        first, _ = computed(llm, TEXT[:length], greedy(3))
        assert computed(llm, TEXT[:length], greedy(3)) == (first, again)


# Pages, and tokens of a step.
CACHES = ((256, 1024), (11, 1024), (11, 7), (20, 16), (12, 33), (256, 1))


def scenario(seed):
    """Make requests: (step of arrival, prompt, params, step at which it is aborted or None, whether its steps fail)."""
    numbers = random.Random(seed)
    made = []
    for index in range(10):
        start = numbers.choice((0, 0, 0, 100))
        prompt = TEXT[start : start + numbers.randint(1, 90)]
        if numbers.random() < 0.5:
            prompt = prompt + [numbers.randint(1, 250) for _ in range(numbers.randint(1, 20))]
        sampled = {} if numbers.random() < 0.6 else {"temperature": 0.9, "seed": index}
        params = greedy(numbers.randint(1, 60), **sampled)
        arrival = numbers.randint(0, 12)
        end = arrival + numbers.randint(0, 20) if numbers.random() < 0.15 else None
        made.append((arrival, prompt, params, end, numbers.random() < 0.15))
    return made


def play(llm, made, monkeypatch, inner=None):
    """Run a scenario, and check the pages after every step.  Returns each request.  inner: runs a step."""
    failing = {}
    inner = inner or llm.engine.runner.step

    def step(batch, cache):
        for request in batch:
            if failing.get(request) is not None and len(request.answer) >= failing[request]:
                raise ZeroDivisionError("injected")
        return inner(batch, cache)

    with monkeypatch.context() as patch, llm.session() as session:
        patch.setattr(llm.engine.runner, "step", step)
        requests, now = {}, 0
        while len(requests) < len(made) or session.unfinished:
            for index, (arrival, prompt, params, _, fails) in enumerate(made):
                if arrival == now:
                    requests[index] = session.add(list(prompt), params)
                    failing[requests[index]] = index % 3 if fails else None
            for index, request in requests.items():
                if made[index][3] is not None and made[index][3] <= now and request in session.unfinished:
                    session.abort(request)
                    check_pages(llm.engine)
            session.step()
            check_pages(llm.engine)
            now += 1
    assert sorted(llm.engine.cache.free) == list(range(llm.engine.cache.num_pages))
    return [requests[index] for index in range(len(made))]


def compare(found, expected, made):
    """Check that two runs of a scenario gave the same answers, and that the first alone shared pages."""
    for one, other, (_, _, _, end, _) in zip(found, expected, made, strict=True):
        assert other.cached_tokens == 0 <= one.cached_tokens < len(one.prompt)
        if end is None:
            assert one.answer == other.answer
            assert (one.error is None) == (other.error is None)
        else:
            # It was aborted, perhaps after more steps.
            shorter = min(len(one.answer), len(other.answer))
            assert one.answer[:shorter] == other.answer[:shorter]
    return torch.tensor([[request.preemptions, request.cached_tokens] for request in found]).sum(0)


def test_random_requests_answer_the_same_with_and_without_reuse(llm, monkeypatch):
    total = torch.zeros(2)
    for seed, (pages, step_tokens) in enumerate(CACHES):
        made = scenario(seed)
        expected = play(fresh(llm, reuse=False), made, monkeypatch)
        total += compare(play(fresh(llm, pages, step_tokens=step_tokens), made, monkeypatch), expected, made)
    assert total[0] > 5 and total[1] > 1000


@pytest.mark.parametrize("method", ("fp8", "int8", "fp8:scale=token"))
def test_shared_pages_hold_bit_for_bit_what_a_request_would_have_computed(tmp_path, method, monkeypatch):
    write_checkpoint(tmp_path, vocab_size=260, max_position_embeddings=256)
    llm = LLM(tmp_path, dtype="float32", kv_cache=method)
    made = scenario(2)
    expected = play(fresh(llm, reuse=False), made, monkeypatch, one_by_one(llm))
    found = play(fresh(llm, 11, step_tokens=7), made, monkeypatch, one_by_one(llm))
    preempted, cached = compare(found, expected, made)
    assert preempted > 0 and cached > 100


@pytest.mark.parametrize("step_tokens", (5, 16, 48, 1024))
def test_requests_that_come_together_read_what_they_share_once(llm, step_tokens):
    fresh(llm, step_tokens=step_tokens)
    prompts = [TEXT[:100] + [200 + index] * 9 for index in range(4)]
    outputs = GenerationOutputs(4)
    found = llm.generate(prompts, greedy(6), outputs=outputs)
    assert outputs.prefill_tokens == 109 + 3 * (109 - 96)
    assert [output.cached_tokens for output in found] == [0, 96, 96, 96]
    expected = [computed(fresh(llm, reuse=False), prompt, greedy(6))[0] for prompt in prompts]
    assert [output.token_ids for output in found] == expected


def test_requests_hold_the_pages_that_they_share_once(llm):
    fresh(llm, pages=16)
    with llm.session() as session:
        requests = [session.add([*TEXT[:96], 9, index], greedy(20)) for index in range(5)]
        session.step()
        session.step()
        assert {tuple(request.pages[:6]) for request in requests} == {tuple(requests[0].pages[:6])}
        assert llm.engine.cache.num_pages - llm.engine.cache.available == 6 + 5
        check_pages(llm.engine)


def test_a_request_that_was_preempted_finds_its_pages_again(llm):
    fresh(llm, pages=13)
    outputs = GenerationOutputs(2)
    with llm.session() as session:
        requests = [session.add(TEXT[200 * i : 200 * i + 80], greedy(60), None, i) for i in range(2)]
        while session.unfinished:
            outputs.record_step([request for request, _ in session.step()], 1.0)
    assert sum(request.preemptions for request in requests) > 0 == outputs.cached_tokens
    again = (
        outputs.prefill_tokens
        - 160
        + sum(
            len(step.running_sequence) - 1
            for t in outputs.trajectories
            for step in map(_Step, t.trajectory)
            if not step.is_prefill
        )
    )
    assert again < 80


class _Step:
    """A recorded step under the names of a request's."""

    def __init__(self, step):
        self.is_prefill, self.running_sequence = step.is_prefill, step.running_token_ids


def test_the_pages_that_were_free_for_longest_go_first(llm):
    fresh(llm, pages=12)
    for start in (0, 100, 0, 200):  # 4 full pages each, and one that is not
        computed(llm, TEXT[start : start + 65], greedy(5))
    read = [computed(llm, TEXT[start : start + 65], greedy(1))[1] for start in (200, 0, 100)]
    assert read[:2] == [1, 1]
    # Its last page had to go.
    assert read[2] == 65 - 3 * PAGE_SIZE


def test_nothing_is_shared_across_a_swap_or_its_undoing(llm):
    fresh(llm)
    prompt = TEXT[:70]
    before, _ = computed(llm, prompt, greedy(4))
    with swap(llm, "**.mlp.**", "int4"):
        swapped, read = computed(llm, prompt, greedy(4))
        assert read == 70
        assert computed(llm, prompt, greedy(4)) == (swapped, 6)
    assert computed(llm, prompt, greedy(4)) == (before, 70)


def test_a_request_under_way_through_a_swap_leaves_nothing_behind(llm):
    fresh(llm)
    stream = llm.stream(TEXT[:40], greedy(40))
    next(stream)
    with swap(llm, "**.mlp.**", "int4"):
        history = TEXT[:40] + [piece.token_id for piece in stream]
        assert computed(llm, history, greedy(1))[1] == len(history)
    assert computed(llm, history, greedy(1))[1] == len(history)


def test_adapters_share_pages_with_themselves_alone(llm, tmp_path):
    fresh(llm)
    adapter_for_shipped(tmp_path, llm)
    llm.load_adapter("odd", tmp_path)
    prompt = TEXT[:70]
    base, _ = computed(llm, prompt, greedy(4))
    odd, read = computed(llm, prompt, greedy(4), adapter="odd")
    assert base != odd and read == 70
    assert computed(llm, prompt, greedy(4)) == (base, 6)
    assert computed(llm, prompt, greedy(4), adapter="odd") == (odd, 6)
    llm.merge_adapter("odd")
    merged, read = computed(llm, prompt, greedy(4))
    assert (merged, read) == (odd, 70)
    llm.unmerge_adapter()
    assert computed(llm, prompt, greedy(4)) == (base, 70)
    llm.load_adapter("odd", tmp_path)
    assert computed(llm, prompt, greedy(4), adapter="odd") == (odd, 70)
    llm.unload_adapter("odd")


def test_a_hook_of_the_user_s_makes_another_model(llm):
    fresh(llm)
    computed(llm, TEXT[:40], greedy(1))
    hook = llm.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert computed(llm, TEXT[:40], greedy(1))[1] == 40
    hook.remove()


def test_what_a_failed_request_computed_is_not_found(llm, monkeypatch):
    fresh(llm)
    inner = llm.engine.runner.step

    def step(batch, cache):
        return inner(batch, cache) * float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "step", step)
        with pytest.raises(Exception, match="not numbers"):
            llm.generate([TEXT[:40]], greedy(2, temperature=1.0, seed=0))
    assert computed(llm, TEXT[:40], greedy(1))[1] == 40
    check_pages(llm.engine)


def test_models_whose_keys_depend_on_the_length_share_nothing(tmp_path):
    write_checkpoint(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    llm = LLM(tmp_path, dtype="float32")
    prompt = [5, 6, 7] * 14
    first, _ = computed(llm, prompt, greedy(4))
    assert computed(llm, prompt, greedy(4)) == (first, 42)


def test_reuse_can_be_turned_off():
    llm = LLM(dtype="float32", prefix_reuse=False)
    assert [computed(llm, TEXT[:40], greedy(1))[1] for _ in range(2)] == [40, 40]


def test_a_prompt_whose_own_log_probabilities_are_wanted_is_read_whole(llm):
    fresh(llm)
    params = greedy(3, prompt_logprobs=1)
    first, second = (llm.generate([TEXT[:50]], params)[0] for _ in range(2))
    assert second.cached_tokens == 0 and len(second.prompt_logprobs) == 50
    assert [entry and entry.logprob for entry in second.prompt_logprobs] == [
        entry and entry.logprob for entry in first.prompt_logprobs
    ]
    (after,) = llm.generate([TEXT[:50]], greedy(3))
    assert after.token_ids == second.token_ids
    check_pages(llm.engine)
