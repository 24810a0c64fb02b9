"""/health: 200 only while the model's thread steps, all parts are there, and requests are taken."""

from __future__ import annotations

import json
import math

import pytest

from pymllm.asynchronous import worker
from pymllm.asynchronous.pulse import FIRST_STEP_SECONDS, LEAST_SECONDS, Pulse
from pymllm.engine.scheduler import STEP_TOKENS
from pymllm.errors import RankError
from pymllm.server import listening
from pymllm.server.limits import Limits
from tests.processes import SECONDS
from tests.server import conftest
from tests.server.by_hand import LONG, get, held_steps, post, send, wait_until
from tests.server.conftest import serve


def health(served):
    """The status of /health, and what it says."""
    status, body, _ = get(served, "/health")
    return status, json.loads(body)


def test_a_step_that_hangs_is_told_and_new_requests_are_refused_until_it_ends(llm):
    with serve(llm, limits=Limits(step_seconds=0.2)) as served, held_steps(llm) as gate:
        assert health(served) == (200, {"status": "ok"})
        with send(served, {**LONG, "max_tokens": 3}) as waiting:
            wait_until(lambda: health(served)[0] == 503)
            assert "no step has ended" in health(served)[1]["reason"]
            status, answer, headers = post(served, {"prompt": "x", "max_tokens": 1})
            assert (status, answer["error"]["code"]) == (503, "unhealthy") and headers["Retry-After"]
            gate.let(math.inf)
            assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: health(served)[0] == 200)
        assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_any_part_may_say_why_the_model_cannot_answer(llm):
    with serve(llm) as served:
        reasons = [None]
        served.app.state.service.worker.checks.append(lambda: reasons[-1])
        assert health(served)[0] == 200
        reasons.append("rank 1 is gone")
        assert health(served) == (503, {"status": "unavailable", "reason": "rank 1 is gone"})
        assert get(served, "/health", "HEAD")[:2] == (503, b"")
        reasons.append(None)
        assert health(served)[0] == 200


@pytest.mark.parametrize("together", [True, False])
def test_a_gpu_that_runs_nothing_more_after_an_error_is_told(llm, monkeypatch, together):
    def step(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(llm.engine if together else llm.engine.runner, "step", step)
    with serve(llm) as served:
        assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 500
        assert health(served)[0] == 200
        monkeypatch.setattr(worker, "device_fault", lambda device: f"the {device} is lost")
        assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 500
        assert health(served)[1]["reason"] == "the cpu is lost"


def test_a_server_that_stops_is_not_healthy(llm):
    with serve(llm) as served:
        served.app.state.traffic.stopping = True
        assert health(served)[0] == 503
        status, answer, headers = post(served, {"prompt": "x", "max_tokens": 1})
        assert (status, answer["error"]["code"]) == (503, "shutting_down") and headers["Retry-After"]


def test_clients_are_told_of_the_end_although_a_step_still_runs(llm, monkeypatch):
    servers = []

    def make(config):
        servers.append(listening.DrainingServer(config))
        return servers[0]

    monkeypatch.setattr(conftest, "DrainingServer", make)
    monkeypatch.setattr(listening, "LAST_SECONDS", SECONDS)
    with serve(llm) as served, held_steps(llm) as gate, send(served, LONG) as connection:
        wait_until(lambda: gate.begun)
        servers[0].should_exit = True
        told = b"".join(iter(lambda: connection.recv(4096), b""))
        assert told.startswith(b"HTTP/1.1 503") and b"the server has stopped before the answer" in told
        assert gate.begun == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_rank_that_is_gone_is_a_503(llm, monkeypatch, stream):
    def step(*_):
        raise RankError("rank 1 did not come", code="rank-lost")

    monkeypatch.setattr(llm.engine.runner, "step", step)
    with serve(llm) as served:
        status, answer, headers = post(served, {"prompt": "x", "max_tokens": 1, "stream": stream})
        assert (status, answer["error"]["code"]) == (503, "rank-lost") and headers["Retry-After"]


def test_requests_are_told_when_the_model_cannot_be_taken_or_its_step_ends_oddly(llm, monkeypatch):
    def taken():
        raise RuntimeError("somebody has the model")

    def leave(*_):
        raise SystemExit("odd")

    with serve(llm) as served:
        with monkeypatch.context() as patch:
            patch.setattr(llm, "session", taken)
            assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 500
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "step", leave)
            assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 500
        assert health(served)[0] == 200
        assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 200
        places = served.app.state.service.worker.places
        assert places.free == places.capacity


def test_how_long_a_step_may_take_follows_from_the_steps_so_far():
    now = [0.0]
    pulse = Pulse(clock=lambda: now[0])

    def step(seconds, tokens):
        started = pulse.beat()
        now[0] += seconds
        assert pulse.note_step(started, tokens) == pytest.approx(seconds)

    pulse.expect()
    now[0] += FIRST_STEP_SECONDS
    assert pulse.why_not() is None
    now[0] += 1
    assert pulse.why_not() is not None
    pulse.rest()
    now[0] += 10**6
    assert pulse.why_not() is None, "nothing is to be done"
    step(0.5, 1024)
    assert pulse.limit == LEAST_SECONDS
    step(0.1, 1)  # a token is never slower to read than the fastest so far
    assert pulse.limit == LEAST_SECONDS
    step(40.0, 64)
    assert pulse.limit == pytest.approx(3 * 40)
    slow = Pulse(clock=lambda: now[0])
    pulse = slow
    step(10.0, 20)
    assert slow.limit == pytest.approx(3 * STEP_TOKENS * 0.5)
    assert Pulse(2.5).limit == 2.5
    slow.beat()
    slow.expect()  # more work does not make it look alive
    now[0] += slow.limit + 1
    slow.expect()
    assert "no step has ended" in slow.why_not()
