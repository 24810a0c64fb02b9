"""Steps by time: what a prompt is read in beside answers, by a clock that the tests turn."""

from __future__ import annotations

import random

import pytest

from pymllm import LLM
from pymllm.engine.pace import FIRST_PIECE, SMALLEST_PIECE, Pace
from pymllm.errors import ConfigError

from .answers import answers, greedy

PROMPTS = [[1 + (7 * i + j) % 250 for j in range(3 + 29 * i)] for i in range(5)]
LONG = [1 + (11 * i * i) % 250 for i in range(900)]


def paced(monkeypatch, seconds, step_ms=150.0):
    """Load a model whose steps take what `seconds(decoding requests, tokens read)` says.  Returns it and its steps."""
    llm = LLM(dtype="float32", step_ms=step_ms, prefix_reuse=False)
    now, steps, inner = [0.0], [], llm.engine.runner.step

    def step(batch, cache):
        reading = [request for request in batch if request.is_prefilling]
        steps.append((len(batch) - len(reading), sum(len(r.running_sequence) for r in reading)))
        now[0] += seconds(*steps[-1])
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    llm.engine.clock = lambda: now[0]
    return llm, steps


def stream_beside(llm, prompt):
    """Read a prompt beside two answers that have begun."""
    with llm.session() as session:
        for first in (5, 6):
            session.add([first] * 20, greedy(150))
        for _ in range(4):
            session.step()
        late = session.add(prompt, greedy(2))
        while not late.answer:
            session.step()


def linear(fixed, token):
    return lambda decoding, read: fixed + 0.001 * decoding + token * read


@pytest.mark.parametrize("token", (0.0001, 0.0005, 0.002, 0.005))
@pytest.mark.parametrize("step_ms", (60.0, 150.0))
def test_no_step_beside_answers_takes_longer_than_its_time(monkeypatch, token, step_ms):
    seconds = linear(0.012, token)
    llm, steps = paced(monkeypatch, seconds, step_ms)
    stream_beside(llm, LONG)
    mixed = [step for step in steps if step[0] and step[1]]
    assert sum(read for _, read in mixed) == 900
    smallest = seconds(2, SMALLEST_PIECE)
    assert max(seconds(*step) for step in mixed) <= max(step_ms / 1000, smallest) + 1e-9
    # Nor is much of the time left unused, but by the last piece, and by the first two, whose speed was a guess.
    assert all(
        read == 900 or seconds(2, read + 2 * SMALLEST_PIECE) > 0.8 * step_ms / 1000 for _, read in mixed[2:-1]
    )


def test_without_answers_prompts_are_read_in_large_pieces(monkeypatch):
    llm, steps = paced(monkeypatch, linear(0.01, 1.0))
    answers(llm, [LONG, LONG[:300]], greedy(1))
    assert steps == [(0, 1024), (0, 176)]


def test_a_machine_that_becomes_slower_gets_smaller_pieces(monkeypatch):
    slow = []
    llm, steps = paced(monkeypatch, lambda decoding, read: 0.01 + read * (0.004 if slow else 0.0005))
    stream_beside(llm, LONG[:600])
    fast = max(read for decoding, read in steps if decoding)
    slow.append(True)
    steps.clear()
    stream_beside(llm, LONG[:600])
    pieces = [read for decoding, read in steps if decoding and read]
    assert fast >= 256 and max(pieces[2:]) <= 48


def test_a_prompt_goes_on_however_slow_its_steps_are(monkeypatch):
    llm, steps = paced(monkeypatch, linear(2.0, 1.0))
    stream_beside(llm, LONG[:200])
    assert {read for decoding, read in steps[2:-1] if decoding and read} == {SMALLEST_PIECE}


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_the_clock(monkeypatch, seed):
    expected = answers(LLM(dtype="float32", prefix_reuse=False), PROMPTS, greedy(30))
    numbers = random.Random(seed)
    llm, steps = paced(monkeypatch, lambda decoding, read: numbers.choice((0.0, 0.001, 0.1, 3.0)))
    with llm.session() as session:
        requests = []
        for prompt in PROMPTS:
            requests.append(session.add(prompt, greedy(30)))
            for _ in range(numbers.randint(1, 4)):
                session.step()
        while session.unfinished:
            session.step()
    assert [tuple(request.answer) for request in requests] == expected
    assert len({read for decoding, read in steps if decoding and read}) > 1


def test_a_failed_step_says_nothing_of_the_speed(monkeypatch):
    llm, _ = paced(monkeypatch, linear(0.01, 0.001))
    inner = llm.engine.runner.step

    def step(batch, cache):
        if any(request.prompt[0] == 13 for request in batch):
            raise ZeroDivisionError("oops")
        return inner(batch, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    with pytest.raises(ZeroDivisionError):
        llm.generate([[13] * 40], greedy(1))
    assert llm.engine.pace.piece() == FIRST_PIECE


def test_the_piece_is_what_fits_beside_the_answers():
    pace = Pace(100.0)
    assert pace.piece() == FIRST_PIECE
    pace.note(0.5, 500, 0)
    assert pace.piece() == 96
    pace.note(0.04, 0, 3)
    assert pace.piece() == 48  # 60 ms at 1 ms a token, in whole pages
    pace.note(0.04 + 250 * 0.003, 250, 3)
    assert pace.piece() == 16  # 60 ms at 2 ms a token: the average of both, whose tokens count alike now
    # The last few tokens of a prompt say nothing.
    pace.note(9.0, 3, 3)
    assert pace.piece() == 16
    pace.note(0.2, 0, 3)
    assert pace.piece() == SMALLEST_PIECE


@pytest.mark.parametrize("step_ms", (0, -1.0, float("inf"), float("nan"), "150", None, True))
def test_what_is_no_time_is_refused(step_ms):
    with pytest.raises(ConfigError, match="step_ms is no time"):
        LLM(step_ms=step_ms)
