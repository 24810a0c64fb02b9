"""Clients that do not read, and those that wait long for a first token: bounded queues, write timeouts, pings."""

from __future__ import annotations

import json
import math
import socket

import openai
import pytest

from pymllm.errors import KernelError
from pymllm.server import connections
from pymllm.server.limits import Limits
from tests.server.by_hand import LONG, held_steps, post, send, wait_until
from tests.server.conftest import MODEL, serve

# Some 2 kB a token.
WORDY = {**LONG, "logprobs": 20, "stream": True}


@pytest.fixture
def small_buffers(monkeypatch):
    """The kernel takes little for a client that does not read."""
    monkeypatch.setattr(connections, "UNSENT_BYTES", 4096)

    def open_connection(address, timeout, source_address=None):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(timeout)
        connection.connect(address)
        return connection

    monkeypatch.setattr(socket, "create_connection", open_connection)


def test_a_client_that_does_not_read_is_cut_off_after_the_write_timeout(llm, small_buffers):
    free = len(llm.engine.cache.free)
    limits = Limits(write_seconds=0.2)
    with serve(llm, limits=limits) as served, held_steps(llm) as gate, send(served, WORDY):
        traffic = served.app.state.traffic
        gate.let(400)
        wait_until(lambda: traffic.refused["not_read"] == 1 and traffic.under_way == 0)
        gate.let(math.inf)
        wait_until(lambda: not traffic.worker.live)
        finished = traffic.worker.tally.finished
        assert (finished["abort"], finished["length"]) == (1, 0)
        assert traffic.worker.places.free == traffic.worker.places.capacity
        assert len(llm.engine.cache.free) == free and traffic.connections == 0


def test_a_client_that_is_too_far_behind_is_ended_and_told_so(llm, small_buffers):
    free = len(llm.engine.cache.free)
    with (
        serve(llm, limits=Limits(pieces=4)) as served,
        held_steps(llm) as gate,
        send(served, WORDY) as silent,
    ):
        traffic = served.app.state.traffic
        wait_until(lambda: traffic.worker.live)
        gate.let(400)
        wait_until(lambda: not traffic.worker.live)
        assert gate.begun < 400
        assert traffic.worker.places.free == traffic.worker.places.capacity
        assert len(llm.engine.cache.free) == free
        received = b""
        while b"behind" not in received:
            received += silent.recv(1 << 16)
        assert b"pieces of its answer behind" in received and b"[DONE]" not in received
        gate.let(math.inf)
        assert post(served, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_a_client_that_reads_slowly_is_not_ended(llm, small_buffers, monkeypatch):
    monkeypatch.setattr(connections, "PROGRESS_BYTES", 1)
    body = {**WORDY, "max_tokens": 60}
    with serve(llm, limits=Limits(write_seconds=0.5)) as served, send(served, body) as slow:
        received = b""
        while b"[DONE]" not in received:
            more = slow.recv(2048)
            assert more, "the connection was closed"
            received += more
        assert received.count(b"data: ") == 61
        assert served.app.state.traffic.refused["not_read"] == 0


def test_a_stream_whose_first_token_takes_long_has_its_headers_and_comments(llm):
    with serve(llm, limits=Limits(ping_seconds=0.05)) as served, held_steps(llm) as gate:
        with send(served, {**LONG, "max_tokens": 4, "stream": True}) as connection:
            received = b""
            while received.count(b": ping\n\n") < 3:
                received += connection.recv(4096)
            assert received.startswith(b"HTTP/1.1 200") and b"data: " not in received
            gate.let()
            while b"data: " not in received:
                received += connection.recv(4096)
            before = received.count(b": ping\n\n")
            while received.count(b": ping\n\n") < before + 2:
                received += connection.recv(4096)
            gate.let(math.inf)
            while b"[DONE]" not in received:
                received += connection.recv(4096)
        body = {"prompt": "import os\n", "max_tokens": 4, "temperature": 0}
        whole = post(served, body)[1]["choices"][0]["text"]
    with serve(llm, limits=Limits(ping_seconds=0.02)) as served, held_steps(llm) as gate:
        stream = served.client().completions.create(model=MODEL, stream=True, **body)
        gate.let(math.inf)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole


@pytest.mark.parametrize("pings", [True, False])
def test_an_error_before_the_first_token_has_its_own_status_unless_the_headers_are_out(
    llm, monkeypatch, pings
):
    def step(*_):
        raise KernelError("no kernel", code="kernel-refused")

    monkeypatch.setattr(llm.engine.runner, "step", step)
    with serve(llm, limits=Limits(ping_seconds=0.05 if pings else 0.0)) as served, held_steps(llm) as gate:
        with send(served, {**LONG, "stream": True}) as connection:
            received = b""
            while pings and b": ping\n\n" not in received:
                received += connection.recv(4096)
            gate.let(math.inf)
            while b"no kernel" not in received:
                received += connection.recv(4096)
        assert received.startswith(b"HTTP/1.1 200" if pings else b"HTTP/1.1 500")
        if pings:
            event = next(line for line in received.decode().splitlines() if line.startswith("data: "))
            assert json.loads(event[6:])["error"]["type"] == "server_error"
            with pytest.raises(openai.APIError, match="no kernel"):
                list(served.client().completions.create(model=MODEL, stream=True, **LONG))
