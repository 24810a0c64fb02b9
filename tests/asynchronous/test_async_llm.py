"""Many tasks on one engine: each gets its own answers and errors, leaves no page behind, and waits in turn."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch

import pymllm
from pymllm import AsyncLLM, SamplingParams
from pymllm.asynchronous.places import Busy, Places
from pymllm.errors import ConfigError, KernelError, RequestError

from ..adapters.handwritten import adapter_for_shipped
from ..processes import SECONDS

PROMPTS = [f"x = {number}\n" for number in range(12)]
LONG = SamplingParams(max_tokens=900, ignore_eos=True)


def short(**settings) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 6, **settings})


def run(work):
    """Run a coroutine function in a loop of its own, for so long at most."""
    return asyncio.run(asyncio.wait_for(work(), SECONDS))


async def until(done):
    while not done():
        await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def llm() -> pymllm.LLM:
    return pymllm.LLM(dtype="float32", progress=False)


@pytest.fixture
def steps(llm, monkeypatch):
    """The sizes of the steps that are run."""
    inner, sizes = llm.engine.runner.step, []

    def step(batch, cache):
        sizes.append(len(batch))
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    return sizes


def test_tasks_at_the_same_time_share_the_steps_and_get_their_own_answers(llm, steps):
    expected = [llm.generate(prompt, short())[0].token_ids for prompt in PROMPTS]
    steps.clear()

    async def work():
        async with AsyncLLM(llm) as engine:
            answers = await asyncio.gather(*(engine.generate(prompt, short()) for prompt in PROMPTS))
            together = await engine.generate(
                PROMPTS[:3], [short(), short(n=2, seed=1, temperature=1.0), short()]
            )
            return [answer.token_ids for (answer,) in answers], together

    found, together = run(work)
    assert found == expected
    assert max(steps) > 1 and len(steps) < 6 * len(PROMPTS)
    assert [len(answer.outputs) for answer in together] == [1, 2, 1]
    assert together[0].token_ids == expected[0] and together[2].token_ids == expected[2]
    assert together[0].metrics.ttft >= together[0].metrics.prefill_seconds > 0


def test_streams_are_those_of_the_model_also_of_n_answers(llm):
    params = short(n=2, seed=3, temperature=1.0)
    expected = [output.text for output in llm.generate(PROMPTS[0], params)[0].outputs]

    async def work():
        async with AsyncLLM(llm) as engine:
            texts = ["", ""]
            async for piece in engine.stream(PROMPTS[0], params):
                texts[piece.index] += piece.text
            return texts

    assert run(work) == expected


@pytest.mark.parametrize("streams", [False, True])
def test_a_cancelled_task_gives_its_pages_back_and_the_others_go_on(llm, streams):
    free = len(llm.engine.cache.free)
    expected = llm.generate("import os\n", short(max_tokens=20))[0].token_ids

    async def consume(engine):
        if streams:
            async for _ in engine.stream("x", LONG):
                pass
        else:
            await engine.generate(["x", "y"], LONG)

    async def work():
        async with AsyncLLM(llm) as engine:
            task = asyncio.create_task(consume(engine))
            await until(lambda: llm.engine.scheduler.running)
            other = asyncio.create_task(engine.generate("import os\n", short(max_tokens=20)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            ((answer,),) = await asyncio.gather(other)
            await until(lambda: llm.engine.idle)
            assert engine._worker.places.free == engine._worker.places.capacity
            return answer

    assert run(work).token_ids == expected
    assert len(llm.engine.cache.free) == free


def test_a_stream_that_is_closed_early_is_aborted(llm):
    async def work():
        async with AsyncLLM(llm) as engine:
            async with contextlib.aclosing(engine.stream("x", LONG)) as pieces:
                async for _ in pieces:
                    break
            await until(lambda: llm.engine.idle)
            places = engine._worker.places
            assert places.free == places.capacity

    free = len(llm.engine.cache.free)
    run(work)
    assert len(llm.engine.cache.free) == free


def test_errors_of_one_request_reach_it_alone(llm, monkeypatch):
    inner = llm.engine.runner.step

    def step(batch, cache):
        if any(request.params.seed == 13 and len(request.answer) == 3 for request in batch):
            raise KernelError("unlucky", code="kernel-refused")
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)

    async def work():
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(
                *(engine.generate("import os\n", short(seed=seed)) for seed in (12, 13, 14)),
                engine.generate([99999], short()),
                engine.generate("x", short(), adapter="none"),
                engine.generate("x", short(regex="(")),
                engine.generate(["x", "y"], [short()]),
                engine.generate("x" * 5000, short()),
                return_exceptions=True,
            )

    first, failed, third, *refused = run(work)
    assert first[0].token_ids == third[0].token_ids and len(first[0].token_ids) == 6
    assert isinstance(failed, KernelError)
    assert all(isinstance(error, (RequestError, ConfigError)) for error in refused)
    assert llm.engine.idle


def test_calls_beyond_the_line_wait_in_turn_before_the_engine_knows_them(llm, monkeypatch):
    known, inner = [], llm.engine.step

    def step():
        known.append(len(llm.engine.scheduler.waiting) + len(llm.engine.scheduler.running))
        return inner()

    monkeypatch.setattr(llm.engine, "step", step)
    order = []

    async def one(engine, number):
        await engine.generate(f"x = {number}\n", short(max_tokens=3, ignore_eos=True))
        order.append(number)

    async def work():
        async with AsyncLLM(llm, max_running=2) as engine:
            await asyncio.gather(*(one(engine, number) for number in range(20)))
            answers = await engine.generate(PROMPTS, short())
            assert len(answers) == len(PROMPTS)
            with pytest.raises(RequestError, match="twice max_running"):
                async for _ in engine.stream("x", short(n=5)):
                    pass

    run(work)
    assert max(known) == 4
    assert sorted(order[:4]) == list(range(4)) and sorted(order) == list(range(20))


def test_closing_waits_for_open_calls_or_aborts_them(llm):
    async def work():
        engine = AsyncLLM(llm)
        task = asyncio.create_task(engine.generate("x", short(max_tokens=30, ignore_eos=True)))
        await until(lambda: llm.engine.scheduler.running)
        await engine.close()
        assert task.done() and len(task.result()[0].token_ids) == 30
        with pytest.raises(RequestError, match="closed"):
            await engine.generate("x", short())
        await engine.close()

        engine = AsyncLLM(llm, max_running=1)
        tasks = [asyncio.create_task(engine.generate("x", LONG)) for _ in range(4)]
        await until(lambda: llm.engine.scheduler.running)
        await engine.close(abort=True)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [error.code for error in errors] == ["closed"] * 4
        assert llm.engine.idle

        with pytest.raises(ZeroDivisionError):
            async with AsyncLLM(llm) as engine:
                task = asyncio.create_task(engine.generate("x", LONG))
                await until(lambda: llm.engine.scheduler.running)
                raise ZeroDivisionError
        assert task.done() and isinstance(task.exception(), RequestError)

    run(work)


@pytest.mark.parametrize("call", ["generate", "score", "embed"])
def test_calls_that_are_not_in_the_line_yet_are_aborted_too(llm, call):
    """A call reads its arguments off the loop first, and of many texts it begins some after others."""
    arguments = {
        "generate": lambda engine: engine.generate("x", LONG),
        "score": lambda engine: engine.score([[1] * 40] * 50),
        "embed": lambda engine: engine.embed([[1] * 40] * 500, pooling="mean"),
    }

    async def work():
        engine = AsyncLLM(llm, max_running=1)
        task = asyncio.create_task(arguments[call](engine))
        await asyncio.sleep(0)
        await engine.close(abort=True)
        assert task.done() and task.exception().code == "closed"
        assert engine._worker.places.free == 2

    run(work)


def test_a_loop_that_ends_with_open_calls_leaves_the_model_free(llm):
    engine = AsyncLLM(llm)

    async def work():
        task = asyncio.ensure_future(engine.generate("x", LONG))
        await until(lambda: llm.engine.scheduler.running)
        del task

    run(work)
    answer = llm.generate("x", short())
    assert len(answer[0].token_ids) > 0 and llm.engine.idle

    async def again():
        async with engine:
            return await engine.generate("x", short())

    assert run(again)[0].token_ids == answer[0].token_ids


def test_scores_chats_and_vectors_are_those_of_the_model(llm):
    messages = [{"role": "user", "content": "Write a function."}]
    texts = [1, 2, 3, 4]

    async def work():
        async with AsyncLLM(llm) as engine:
            return await asyncio.gather(
                engine.score("def f(x):\n    return", [" x", " y", " x + 1"]),
                engine.chat(messages, short()),
                engine.embed([texts, texts[:2]], pooling="mean"),
                engine.embed(texts, pooling="mean"),
                engine.score([], []),
                engine.generate([], short()),
            )

    scores, chat, vectors, vector, none, nothing = run(work)
    expected = llm.score("def f(x):\n    return", [" x", " y", " x + 1"])
    assert [score.token_ids for score in scores] == [score.token_ids for score in expected]
    for score, other in zip(scores, expected, strict=True):
        assert score.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert chat.token_ids == llm.chat(messages, short()).token_ids
    torch.testing.assert_close(vectors[0], vector, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vector, llm.embed(texts, pooling="mean"), rtol=1e-3, atol=1e-3)
    assert none == [] and nothing == []


def test_settings_that_cannot_be_are_named(llm):
    for options in ({"max_running": 0}, {"max_running": True}, {"device": "cpu"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            AsyncLLM(llm, **options)
    assert pymllm.AsyncLLM is AsyncLLM


def test_places_go_to_whoever_waits_longest_and_come_back_from_whoever_left():
    async def work():
        places, order = Places(3), []

        async def take(name, count):
            await places.wait(count)
            order.append(name)

        await places.wait(2)
        large, small, last = (
            asyncio.create_task(take(name, count))
            for name, count in (("large", 3), ("small", 1), ("last", 2))
        )
        await asyncio.sleep(0)
        assert order == []
        with pytest.raises(Busy):
            places.take()  # there is one, but others came first
        large.cancel()
        await asyncio.gather(large, return_exceptions=True)
        await small
        assert order == ["small"] and places.free == 0
        places.give_back(2)
        # Cancelled after the places were granted, before the task has run.
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        assert places.free == 2
        waiting = asyncio.create_task(take("never", 3))
        await asyncio.sleep(0)
        places.refuse_waiting(ValueError("no more"))
        with pytest.raises(ValueError, match="no more"):
            await waiting
        places.give_back()
        assert places.free == 3

    run(work)


def test_adapters_come_and_go_between_two_steps(llm, tmp_path):
    adapter_for_shipped(tmp_path, llm)

    async def work():
        async with AsyncLLM(llm) as engine:
            await engine.load_adapter("odd", tmp_path)
            with pytest.raises(ConfigError, match="no adapter 'even'"):
                await engine.unload_adapter("even")
            other = asyncio.create_task(engine.generate(PROMPTS[0], short(max_tokens=40, ignore_eos=True)))
            pieces = engine.stream(PROMPTS[0], LONG, adapter="odd")
            await anext(pieces)
            await engine.unload_adapter("odd")
            with pytest.raises(RequestError, match="'odd' was unloaded") as caught:
                async for _ in pieces:
                    pass
            assert caught.value.code == "adapter-gone"
            with pytest.raises(RequestError, match="no adapter 'odd'"):
                await engine.generate(PROMPTS[0], short(), adapter="odd")
            return (await other)[0].token_ids

    answer = run(work)
    assert answer == llm.generate(PROMPTS[0], short(max_tokens=40, ignore_eos=True))[0].token_ids
