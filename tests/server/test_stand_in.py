"""What answers while a server is started anew, and the parent's choices."""

from __future__ import annotations

import http.client
import json
import socket
import sys

import pytest

from pymllm.server.stand_in import StandIn
from pymllm.server.supervisor import RESTART, Supervisor
from tests.processes import SECONDS


@pytest.fixture
def listener():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


@pytest.mark.parametrize("method, body", (("GET", None), ("HEAD", None), ("POST", b"x" * (3 << 20))))
def test_everybody_gets_503_and_the_reason_until_it_is_over(listener, method, body):
    stand_in = StandIn(listener)
    stand_in.start("rank 1 is lost")
    connection = http.client.HTTPConnection(*listener.getsockname(), timeout=SECONDS)
    connection.request(method, "/v1/completions", body)
    answer = connection.getresponse()
    assert answer.status == 503 and int(answer.headers["Retry-After"])
    text = answer.read()
    assert not text if method == "HEAD" else "rank 1 is lost" in json.loads(text)["error"]["message"]
    stand_in.stop()
    # Whoever connects now waits for the server.
    with socket.create_connection(listener.getsockname()) as waiting:
        waiting.sendall(b"GET / HTTP/1.1\r\n\r\n")
        waiting.settimeout(0.3)
        with pytest.raises(TimeoutError):
            waiting.recv(1)


# Servers by what they do: the first argument is a file in which each counts.
START = """
import os, sys, pathlib
from pymllm.server.supervisor import Served
count = pathlib.Path(sys.argv[1])
mine = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (mine + 1))
served = Served.from_environment()
"""
SERVERS = {
    "ends": ("served.say(serving=True); sys.exit(0)", 0, 1),
    "cannot start": ("sys.exit(3)", 3, 1),
    "is lost twice": (
        "served.say(serving=True)\nserved.replace('lost', lambda: None) if mine < 2 else sys.exit(0)",
        0,
        3,
    ),
    "is killed once": (
        "served.say(serving=True)\nos.kill(os.getpid(), 9) if mine < 1 else sys.exit(0)",
        0,
        2,
    ),
    "comes back no more": (f"mine or served.say(serving=True)\nsys.exit({RESTART} if not mine else 4)", 4, 4),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_started_anew_unless_it_has_ended_or_cannot_start(listener, tmp_path, monkeypatch, name):
    code, expected, starts = SERVERS[name]
    script, count = tmp_path / "server.py", tmp_path / "count"
    script.write_text(START + code)
    monkeypatch.setattr("pymllm.server.supervisor.COMMAND", (sys.executable,))
    monkeypatch.setattr("pymllm.server.supervisor.signal.signal", lambda *_: None)
    assert Supervisor(listener, [str(script), str(count)]).run() == expected
    assert len(count.read_text()) == starts
