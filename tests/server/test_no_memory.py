"""A step of the server's that gets no memory: its clients are told so, and the next are answered."""

from __future__ import annotations

import http.client
import json

import pytest

from tests.processes import SECONDS

from ..injecting import no_memory
from .by_hand import assert_alive, post
from .conftest import serve

ASKED = {"prompt": "x", "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def failing(llm, monkeypatch):
    """A server, and a function that has all steps after the next `count` fail."""
    inner = llm.engine.runner.step
    left = [None]

    def step(requests, cache):
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise no_memory(1 << 30)
        return inner(requests, cache)

    monkeypatch.setattr(llm.engine.runner, "step", step)
    with serve(llm) as served:
        yield served, lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_first_step_gets_no_memory_is_refused_for_now(failing, stream):
    served, fail_after = failing
    fail_after(0)
    status, answer, headers = post(served, {**ASKED, "stream": stream})
    assert (status, answer["error"]["code"], answer["error"]["type"]) == (
        503,
        "out-of-memory",
        "server_error",
    )
    assert f"{1 << 30} bytes" in answer["error"]["message"] and headers["Retry-After"]
    check_alive(served, fail_after)


def test_a_stream_that_has_begun_ends_with_the_error(failing):
    served, fail_after = failing
    fail_after(3)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
    connection.request("POST", "/v1/completions", json.dumps({**ASKED, "stream": True}))
    events = connection.getresponse().read().decode().split("\n\n")
    connection.close()
    assert (
        len(events) > 2
        and "run out of memory" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
    )
    check_alive(served, fail_after)


def check_alive(served, fail_after):
    fail_after(None)
    assert_alive(served)
    places = served.app.state.service.worker.places
    assert places.free == places.capacity
    engine = served.llm.engine
    assert engine.idle and engine.cache.available == engine.cache.num_pages
