"""Requests by hand, and the model's steps one by one, for tests of what clients do to a server."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
import time

from tests.processes import SECONDS

LONG = {"prompt": "import os\n", "max_tokens": 900, "logit_bias": {"0": -100, "2": -100}}


def post(served, body, path="/v1/completions", headers=None):
    """Post a body, and return (status, JSON, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers
    finally:
        connection.close()


def assert_alive(served):
    status, answer, _ = post(served, {"prompt": "x", "max_tokens": 1})
    assert status == 200 and answer["choices"]


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.005)


def connect(served):
    """Open a connection."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS)


def send(served, body):
    """Open a connection with a request on its way."""
    data = json.dumps(body).encode()
    connection = connect(served)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


class Gate:
    """A gate before every step of an engine: a step that has begun waits until `let` lets it through."""

    def __init__(self, step):
        self._step, self._changed = step, threading.Condition()
        self.begun = self._allowed = 0

    def step(self):
        with self._changed:
            self.begun += 1
            assert self._changed.wait_for(lambda: self.begun <= self._allowed, SECONDS)
        return self._step()

    def let(self, steps=1):
        """Let this many more steps through."""
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()


@contextlib.contextmanager
def held_steps(llm):
    """Hold the engine's steps, so that nothing depends on how fast they are."""
    gate = Gate(llm.engine.step)
    llm.engine.step = gate.step
    try:
        yield gate
    finally:
        gate.let(math.inf)
        del llm.engine.step


def calls_of(monkeypatch, owner, name):
    """Watch a method, and return the list of its calls so far."""
    method, calls = getattr(owner, name), []

    def watched(*arguments):
        result = method(*arguments)
        calls.append(arguments)
        return result

    monkeypatch.setattr(owner, name, watched)
    return calls


def all_at_once(ask, *arguments):
    """Call `ask` with each argument, in threads of their own, and return them."""
    threads = [threading.Thread(target=ask, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    return threads


def get(served, path, method="GET", headers=None):
    """Ask for a path, and return (status, body, headers)."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()
