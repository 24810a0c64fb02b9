"""`pymllm serve` as a process: it starts, says where, drains on SIGTERM, and says what it lacks."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.request

import openai
import pytest
import uvicorn

from pymllm.cli import main, serve
from pymllm.cli.serve_options import add_operation_options, limits_of
from pymllm.server.limits import Limits

from ..processes import SECONDS, environment

REQUEST = {"prompt": "import os\n", "max_tokens": 60, "temperature": 0, "logit_bias": {"0": -100, "2": -100}}
# Long enough for a second signal to arrive in the middle of it, whatever the kernels.
LONG = {**REQUEST, "prompt": ["import os\n"] * 16, "max_tokens": 900}


@contextlib.contextmanager
def started(*arguments, files=None, **env):
    """The process and its address.  files: how many it may open."""

    def prepare():
        # As from a terminal: what runs in a shell's background is born deaf to Ctrl+C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    process = subprocess.Popen(
        [sys.executable, "-m", "pymllm", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS="1", **env),
        preexec_fn=prepare,
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


def test_sigterm_ends_although_a_client_does_not_read_and_tells_those_who_wait():
    with started("--drain-seconds", "1", "--write-timeout", "600") as (process, address):
        port = int(address.rsplit(":", 1)[1].removesuffix("/v1"))
        silent = socket.socket()
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", port))
        body = json.dumps({**LONG, "logprobs": 20, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall(head.encode() + body)
        stream = client(address).completions.create(model="pymllm-shipped", stream=True, **LONG)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert "once more" in process.stderr.readline()
        with pytest.raises(openai.APIStatusError, match="stopping"):
            client(address).models.list()
        with pytest.raises(openai.APIError, match="the server has stopped before the answer was there"):
            list(stream)
        assert process.wait(SECONDS) == 0
        assert "Traceback" not in process.stderr.read()
        silent.close()


def test_a_process_that_may_open_few_files_answers_health_beside_more_idle_connections():
    with started(files=200) as (_, address):
        port = int(address.rsplit(":", 1)[1].removesuffix("/v1"))
        idle = [socket.create_connection(("127.0.0.1", port), SECONDS) for _ in range(300)]
        health = address.removesuffix("/v1") + "/health"
        with urllib.request.urlopen(health, timeout=SECONDS) as answer:
            assert answer.status == 200
        answer = client(address).completions.create(model="pymllm-shipped", prompt="x", max_tokens=1)
        assert answer.choices
        for connection in idle:
            connection.close()


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


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_operation_options(parser)
    return parser.parse_args(arguments)


def test_every_limit_has_a_flag_and_help_that_states_its_default():
    assert limits_of(parse()) == Limits()
    given = [
        "--max-connections",
        "7",
        "--max-body-mb",
        "0.5",
        "--header-timeout",
        "1",
        "--body-timeout",
        "2",
        "--keep-alive",
        "3",
    ]
    given += [
        "--write-timeout",
        "4",
        "--ping-seconds",
        "0",
        "--drain-seconds",
        "0",
        "--step-timeout",
        "5",
        "--retry-after",
        "6",
    ]
    assert limits_of(parse(*given)) == Limits(
        connections=7,
        body_bytes=1 << 19,
        header_seconds=1,
        body_seconds=2,
        idle_seconds=3,
        write_seconds=4,
        ping_seconds=0,
        drain_seconds=0,
        step_seconds=5,
        retry_after=6,
    )
    shown = argparse.ArgumentParser()
    add_operation_options(shown)
    text, defaults = " ".join(shown.format_help().split()), Limits()
    for name in ("connections", "header_seconds", "idle_seconds", "write_seconds", "ping_seconds"):
        assert f"default: {getattr(defaults, name):g}" in text, name


def test_names_that_a_request_can_have_are_taken():
    origins, hosts = (
        ["https://example.org", "http://[::1]:3000", "null", "*"],
        ["box", "[::1]", "fe80::1", "10.0.0.1", "*"],
    )
    args = parse(*(f"--cors={one}" for one in origins), *(f"--allowed-host={one}" for one in hosts))
    assert (args.cors, args.allowed_host) == (origins, hosts)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--max-connections", bad) for bad in ("0", "-1", "x", "1.5", "99999999")),
        *(("--write-timeout", bad) for bad in ("0", "-1", "nan", "inf", "soon")),
        *(("--ping-seconds", bad) for bad in ("-1", "nan", "inf")),
        ("--access-log", "xml"),
        *(("--cors", bad) for bad in ("", "example.org", "https://", "https://example.org/chat")),
        *(
            ("--allowed-host", bad)
            for bad in ("", "http://box", "box:8000", "10.0.0.1:80", "[::1]:80", "a b")
        ),
    ],
)
def test_a_limit_out_of_range_is_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        parse(f"{flag}={value}")
    assert flag in capsys.readouterr().err


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
    assert captured.err.startswith("error: ") and "pip install 'fastapi>=" in captured.err


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
