"""Clocks that jump: the date is put right by hours, the machine sleeps, a container is paused."""

from __future__ import annotations

import itertools
import random
import re
import time
from types import SimpleNamespace

import pytest
import torch

from pymllm import LLM, SamplingParams
from pymllm.asynchronous.places import Places
from pymllm.asynchronous.pulse import LEAST_SECONDS, Pulse
from pymllm.engine.pace import Pace
from pymllm.errors import RankError
from pymllm.parallel import away, heartbeat, leader
from pymllm.parallel.away import LONGEST_LOOK, Looks
from pymllm.parallel.ranks import Ranks

from . import structure

HOURS = 9000.0
SETTABLE = re.compile(
    r"\btime\.time(?:_ns)?\b|from time import|\bdate(?:time)?\.(?:now|utcnow|today)\b|CLOCK_REALTIME"
)
# Where a date is meant: of an answer, a model, a line of the log, a request, a template's today, a gauge of vLLM's.
DATES = {
    "server/answers/base.py": 1,
    "server/endpoints/models.py": 1,
    "server/records.py": 1,
    "server/metrics.py": 1,
    "engine/metrics.py": 1,
    "loading/packed_cache.py": 1,  # beside the time of a file
    "text/children/templates.py": 1,
}


def test_no_span_is_measured_by_a_clock_that_can_be_set():
    found = {}
    for path in structure.PACKAGE.rglob("*.py"):
        count = len(SETTABLE.findall(path.read_text(encoding="utf-8")))
        if count:
            found[path.relative_to(structure.PACKAGE).as_posix()] = count
    assert found == DATES


def test_a_date_that_jumps_changes_no_span(monkeypatch):
    jumps = itertools.cycle((0.0, -HOURS, HOURS, -1e9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    (output,) = LLM(progress=False).generate(["x"], SamplingParams(max_tokens=2, ignore_eos=True))
    metrics = output.metrics
    assert len(output.token_ids) == 2
    spans = (metrics.queue_seconds, metrics.prefill_seconds, metrics.decode_seconds, metrics.total_seconds)
    assert all(0 <= span < 600 for span in spans)


def test_a_clock_that_stands_still_divides_by_nothing(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    (output,) = LLM(progress=False).generate(["x"], SamplingParams(max_tokens=2, ignore_eos=True))
    assert output.prefill_tokens_per_second == output.decode_tokens_per_second == 0.0
    assert not output.metrics.tpot and output.metrics.decode_seconds == 0.0


def test_a_watcher_knows_that_it_was_away():
    now = [0.0]
    watch = Looks(lambda: now[0])
    for seconds in (0.2, 1.0, LONGEST_LOOK):
        now[0] += seconds
        assert watch.missed() == 0.0
    now[0] += HOURS
    assert watch.missed() == HOURS
    assert watch.missed() == 0.0


def test_a_thread_is_not_called_hung_for_a_time_in_which_nothing_ran():
    now = [100.0]
    pulse = Pulse(clock=lambda: now[0])
    started = pulse.beat()
    pulse.note_step(started, 10)
    started = pulse.beat()
    pulse.look()
    for _ in range(3):
        now[0] += HOURS
        pulse.look()
        assert pulse.why_not() is None
    # What it really is silent for counts as before, in looks of a second.
    for _ in range(int(LEAST_SECONDS) + 1):
        assert pulse.why_not() is None
        now[0] += 1.0
        pulse.look()
    assert pulse.why_not() is not None
    pulse.note_step(started, 10)
    assert pulse.why_not() is None
    # The step that slept does not make a later silence usual.
    assert pulse.limit < 2 * 3 * LEAST_SECONDS
    pulse.rest()
    now[0] += HOURS
    pulse.look()
    assert pulse.why_not() is None


def test_one_step_that_slept_says_nothing_of_the_speed():
    pace = Pace()
    for _ in range(5):
        pace.note(0.010, 0, 2)
        pace.note(0.060, 100, 2)
    before = pace.piece()
    for read in (100, 0):
        pace.note(HOURS, read, 2)
        assert pace.piece() == before
        pace.note(0.010, 0, 2)
    # One that is slow from now on is believed.
    for _ in range(2):
        pace.note(4.0, 100, 2)
    assert pace.piece() < before


def test_the_line_is_not_slower_after_a_sleep():
    now = [0.0]
    places = Places(4, lambda: now[0])
    places.take(4)
    for _ in range(3):
        now[0] += 1.0
        places.give_back()
        places.take()
    assert places.seconds_of_line() == pytest.approx(4.0)
    now[0] += HOURS
    # Nothing is known of how fast it is now.
    assert places.seconds_of_line() is None
    assert Places(2, lambda: 1.0).seconds_of_line() is None


def fake_clock(patch, module, now):
    """Have a module, and the watch of its loop, read this time."""
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=time.sleep)
    patch.setattr(module, "time", clock)
    patch.setattr(away.Looks.__init__, "__defaults__", (lambda: now[0],))


def test_ranks_that_slept_together_are_not_lost(monkeypatch):
    now = [50.0]
    fake_clock(monkeypatch, leader, now)
    ranks = leader.Leader(2, Ranks(started=0))
    try:
        link = SimpleNamespace(heard=now[0], ping=lambda: None, close=lambda: None)
        ranks.links[1] = link
        ranks._look()
        now[0] += HOURS
        ranks._look()
        ranks.check()
        # One that says nothing after that is lost, as ever.
        for _ in range(9):
            ranks.check()
            now[0] += 1.0
            ranks._look()
        with pytest.raises(RankError, match="no word of it"):
            ranks.check()
    finally:
        ranks._ended = True
        ranks._listener.close()


class Store:
    """torchrun's store, in which rank 1 leaves no sign any more."""

    def set(self, key, value):
        pass

    def check(self, keys):
        return False


def test_ranks_of_torchrun_that_slept_together_are_not_lost(monkeypatch):
    now = [50.0]
    fake_clock(monkeypatch, heartbeat, now)
    gaps = iter([1.0, HOURS, 1.0, *[1.0] * 8])
    beats = heartbeat.Heartbeat.__new__(heartbeat.Heartbeat)
    beats.rank, beats.size, beats._store = 0, 2, Store()
    beats._keys, beats._signs = ["a", "b"], [b"", b""]
    beats._seen, beats._looked, beats._watch = [now[0]] * 2, now[0], Looks()
    lost = []

    def wait(seconds):
        try:
            beats.check()
            lost.append(False)
        except RankError:
            lost.append(True)
        gap = next(gaps, None)
        now[0] += gap or 0.0
        return gap is None

    beats._over = SimpleNamespace(wait=wait)
    beats._beat()
    assert lost == [False] * 11 + [True]


def test_what_seeds_are_made_of_is_no_clock(monkeypatch):
    """Two answers without a seed differ, though every clock stands still; monotonic is that of other tests' servers."""
    for name in ("time", "time_ns", "perf_counter", "perf_counter_ns"):
        monkeypatch.setattr(time, name, lambda: 7)
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.5)
    llm = LLM(progress=False)
    torch.manual_seed(random.SystemRandom().getrandbits(32))
    first, second = (llm.generate(["x"], params)[0].token_ids for _ in range(2))
    assert first != second
