"""`pymllm serve` as a process: it starts, says where, drains on SIGTERM, and says what it lacks."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
import uvicorn

from pymllm.cli import main, serve

from ..processes import SECONDS, environment

REQUEST = {"prompt": "import os\n", "max_tokens": 60, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}
# Long enough for a second signal to arrive in the middle of it, whatever the kernels.
LONG = {**REQUEST, "prompt": ["import os\n"] * 16, "max_tokens": 900}


@contextlib.contextmanager
def started(*arguments, **env):
    """The process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pymllm", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1", **env),
        # As from a terminal: what runs in a shell's background is born deaf to Ctrl+C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        address = re.search(r"http://[\d.]+:\d+/v1", line)
        assert address, line + process.stderr.read()
        assert "KV cache of 16384 tokens" in line
        assert f"{address[0].removesuffix('v1')})" in line, "the page"
        yield process, address[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def client(address, api_key="none"):
    return openai.OpenAI(base_url=address, api_key=api_key, max_retries=0, timeout=SECONDS)


def test_sigterm_finishes_what_is_under_way_and_takes_nothing_new():
    with started() as (process, address):
        model = client(address).models.list().data[0].id
        assert model == "pymllm-shipped"
        stream = client(address).completions.create(model=model, stream=True, **REQUEST)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(SECONDS) == 0
        with pytest.raises(openai.APIConnectionError):
            client(address).models.list()
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_stops_at_once():
    with started(PYMLLM_API_KEY="secret") as (process, address):
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()
        stream = client(address, "secret").completions.create(model="pymllm-shipped", stream=True, **LONG)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert "once more" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM, "0 is a server that has answered all of it"


def test_ctrl_c_is_130():
    with started() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_taken_port_is_known_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "/no/such/folder", "--port", str(taken.getsockname()[1])]) == 1
    assert "cannot listen" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--port", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and "pip install 'pymllm[server]'" in captured.err


def test_a_signal_that_comes_while_a_line_is_written_does_not_write_within_it(monkeypatch):
    said, within = [], False

    def say(line):
        nonlocal within
        assert not within
        within = True
        if not said:
            server.handle_exit(signal.SIGTERM, None)
        said.append(line)
        within = False

    monkeypatch.setattr(serve, "say", say)
    server = serve.make_server(uvicorn.Config(lambda *_: None, lifespan="off", log_level="warning"), "hello")
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
    try:
        with serve.bind("127.0.0.1", 0) as listener:
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said[0] == "hello" and "once more" in said[1]
