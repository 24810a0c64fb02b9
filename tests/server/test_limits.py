"""What a hostile, hasty or unlucky client gets: an OpenAI error object, and a server that lives on."""

from __future__ import annotations

import http.client
import json
import math
import re
import time

import openai
import pytest

from pymllm.asynchronous.worker import Generation, Worker
from pymllm.errors import KernelError
from pymllm.server.connections import Connection
from pymllm.server.limits import Limits
from tests.server.by_hand import (
    LONG,
    all_at_once,
    assert_alive,
    calls_of,
    connect,
    get,
    held_steps,
    post,
    send,
    wait_until,
)
from tests.server.conftest import MODEL, serve

CHATS = "/v1/chat/completions"
LONG_NAME = "y" * 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"{bad",
        b"",
        b"[]",
        b'"text"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": "x", "metadata": {"a": 1, "a": 1}}',
        b'{"prompt": "x", "metadata": [' + b"[]," * 200_000 + b"[]]}",
    ],
)
def test_what_is_not_a_json_object_is_refused(served, body):
    status, answer, _ = post(served, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]
    assert_alive(served)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-38),
        ("presence_penalty", 3),
        ("max_tokens", 0),
        ("max_tokens", 10**18),
        ("max_tokens", 1.5),
        ("seed", "one"),
        ("seed", 10**30),
        ("logprobs", 10**6),
        ("stop", ["x"] * 500_000),
        ("stop", [""]),
        ("stop", 7),
        ("logit_bias", {str(token): 1 for token in range(2000)}),
        ("logit_bias", {"5": 1e6}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"4000000000": 1}),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"5": 1, "05": 2}),
        ("response_format", {"type": "text", "regex": "a"}),
        ("response_format", {"type": "json_object", "json_schema": {"schema": {}}}),
        ("guided_json", '{"a":' * 980 + "{}" + "}" * 980),
        ("metadata", {"a": [{}] * 40_000}),
        ("prompt", [1, 10**9]),
        ("prompt", [-1]),
        ("prompt", []),
        ("prompt", ""),
        ("prompt", ["x"] * 1000),
        ("prompt", {"text": "x"}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_a_value_out_of_range_names_its_parameter(served, parameter, value):
    status, answer, _ = post(served, {"prompt": "x", "max_tokens": 1, parameter: value})
    assert (status, answer["error"]["param"]) == (400, parameter)


@pytest.mark.parametrize("depth", [300, 900, 980])
def test_what_is_nested_deeply_is_refused_by_its_name(served, depth):
    nested = '{"a": ' * depth + "1" + "}" * depth
    for body in (
        '{"messages": [{"role": "user", "content": "a", "b": %s}]}',
        '{"messages": [], "guided_json": %s}',
    ):
        status, answer, _ = post(served, (body % nested).encode(), "/v1/chat/completions")
        assert status == 400 and "is nested too deeply" in answer["error"]["message"]
        assert answer["error"]["param"] in ("messages", "guided_json")


def test_of_many_faults_the_first_is_read(served, monkeypatch):
    """A list is not read on behind what is wrong, which would take seconds in which nobody is answered."""
    errors = []
    monkeypatch.setattr(
        "pymllm.server.protocol.base._most_telling",
        lambda error: errors.extend(error.errors()) or error.errors()[0],
    )
    for name in ("prompt", "stop", "stop_token_ids", "bad_words", "guided_choice"):
        status, *_ = post(served, {"prompt": "x", name: [1.5] * 1000})
        assert status == 400
    for name in ("tools", "messages", "documents"):
        status, *_ = post(served, {"messages": [{"role": "user", "content": "x"}], name: [7] * 1000}, CHATS)
        assert status == 400
    assert 8 <= len(errors) < 20


@pytest.mark.parametrize(
    "asked",
    [
        {LONG_NAME: 1},
        {"model": LONG_NAME},
        {"stop": {LONG_NAME: 1}},
        {"messages": [{"role": "user", "content": "x", LONG_NAME: 1}]},
        {"chat_template_kwargs": {LONG_NAME: 1}},
        {"tool_choice": LONG_NAME},
    ],
    ids=lambda asked: next(iter(asked))[:20],
)
def test_a_long_name_is_shown_in_part(served, asked, monkeypatch):
    """Nor is it made an expression to search by, which takes seconds."""
    escaped, escape = [], re.escape
    monkeypatch.setattr(re, "escape", lambda text: escaped.append(len(text)) or escape(text))
    status, answer, _ = post(served, {"messages": [{"role": "user", "content": "x"}], **asked}, CHATS)
    assert status in (400, 404) and len(json.dumps(answer)) < 2000
    assert max(escaped, default=0) < 2000


def test_braces_in_a_text_are_no_objects(served):
    code = '[{"\\"]' * 100_000
    status, answer, _ = post(served, {"prompt": code})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "x", "colour": "red"}],
        [{"role": "user", "content": "x", "reasoning_content": "y"}],
        [{"role": "user", "content": "x", "tool_call_id": "a"}],
        [{"role": "assistant", "content": "x", "audio": {"id": "a"}}],
        [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}],
    ],
)
def test_messages_that_cannot_be_honoured_are_refused(served, messages):
    status, answer, _ = post(served, {"messages": messages}, "/v1/chat/completions")
    assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_a_part_of_a_message_that_is_no_text_is_refused_by_its_kind_and_place(served, kind):
    content = [{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "data:,x"}}]
    message = {"role": "user", "content": content}
    status, answer, _ = post(served, {"messages": [message]}, "/v1/chat/completions")
    error = answer["error"]
    assert (status, error["param"], error["code"]) == (400, "messages", "unsupported_content")
    assert f"'{kind}' (at messages.0.content.1)" in error["message"]


def test_a_body_that_is_too_large_is_refused(served):
    status, answer, _ = post(served, b" " * (Limits().body_bytes + 1))
    assert status == 413 and answer["error"]["message"]
    assert_alive(served)


@pytest.mark.parametrize(("length", "status"), [("-5", 400), ("1e3", 400), ("99999999999999999999", 413)])
def test_a_false_content_length_is_refused(served, length, status):
    with connect(served) as connection:
        connection.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        )
        assert connection.recv(100).startswith(f"HTTP/1.1 {status}".encode())
    assert_alive(served)


@pytest.mark.parametrize("requests_before", [0, 1])
@pytest.mark.parametrize("started", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_headers_that_do_not_come_are_not_waited_for(llm, requests_before, started):
    if requests_before and not started:
        pytest.skip("an idle connection is kept for a while, by its own limit")
    with serve(llm, limits=Limits(header_seconds=0.5)) as served, connect(served) as connection:
        # The time runs from the connection on, and else from the first byte of the late headers.
        for _ in range(requests_before):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(1000)
        connection.sendall(started)
        received = b""
        while more := connection.recv(1000):
            received += more
        assert received.startswith(b"HTTP/1.1 408") and b"headers" in received


def test_an_answer_may_take_longer_than_headers_may(llm, monkeypatch):
    arrived = calls_of(monkeypatch, Worker, "start")
    body = {**LONG, "max_tokens": 5}
    with (
        serve(llm, limits=Limits(header_seconds=1.0)) as served,
        held_steps(llm) as gate,
        send(served, body) as connection,
    ):
        wait_until(lambda: arrived)
        time.sleep(1.5)
        gate.let(math.inf)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", (20_000, 60_000))
def test_large_headers_are_refused(served, size):
    assert post(served, {"prompt": "x"}, headers={"X-Filler": "a" * size})[0] == 431
    assert_alive(served)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nX-Filler: " + b"a" * 70_000, 431),
        (b"\x00\x01\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_gets_an_error_object_too(served, sent, status):
    with connect(served) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert "\r\nX-Request-Id: " in head
    assert_alive(served)


def test_unknown_paths_and_methods_are_json_errors(served):
    assert post(served, {}, "/v1/images/generations")[0] == 404
    status, answer, _ = post(served, {}, "/v1/models")
    assert status == 405 and answer["error"]["type"] == "invalid_request_error"


def test_everything_but_health_and_the_page_needs_the_key(llm):
    with serve(llm, api_key="secret") as served:
        assert served.client("secret").models.list().data
        # The scheme's case is free.
        assert get(served, "/v1/models", headers={"Authorization": "bearer secret"})[0] == 200
        for key in ("wrong", "secret2", "secre"):
            with pytest.raises(openai.AuthenticationError):
                served.client(key).completions.create(model=MODEL, prompt="x", max_tokens=1)
        for path in ("/v1/completions", "//health", "/health/../v1/models", "/health/", "/%68ealth2"):
            assert post(served, {}, path)[0] == 401
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    ("stream", "early"),
    [(False, b""), (True, b""), (False, b"\r\n"), (True, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")],
)
def test_a_client_that_leaves_is_aborted_within_a_step_or_two(llm, monkeypatch, stream, early):
    with serve(llm) as served, held_steps(llm) as gate:
        free = len(llm.engine.cache.free)
        left = calls_of(monkeypatch, Generation, "close")
        connection = send(served, {**LONG, "stream": stream})
        gate.let(2)
        wait_until(lambda: gate.begun == 3)
        if early:  # the next request, before the answer to this one
            received = calls_of(monkeypatch, Connection, "data_received")
            connection.sendall(early)
            wait_until(lambda: received)
        connection.close()
        wait_until(lambda: left)
        gate.let(math.inf)
        wait_until(lambda: len(llm.engine.cache.free) == free)
        assert gate.begun == 3
        assert_alive(served)


def test_a_client_that_leaves_while_it_waits_never_runs(llm, monkeypatch):
    with serve(llm, max_running=1) as served, held_steps(llm) as gate:
        arrived, left = calls_of(monkeypatch, Worker, "start"), calls_of(monkeypatch, Generation, "close")
        inner, ran = llm.engine.runner.step, set()
        monkeypatch.setattr(
            llm.engine.runner, "step", lambda batch, *a: (ran.update(batch), inner(batch, *a))[1]
        )
        first = send(served, LONG)
        gate.let()
        wait_until(lambda: len(ran) == 1)
        second = send(served, LONG)
        wait_until(lambda: len(arrived) == 2)
        gate.let()
        wait_until(lambda: len(llm.engine.scheduler.waiting) == 1)
        second.close()
        wait_until(lambda: len(left) == 1)
        gate.let()
        wait_until(lambda: not llm.engine.scheduler.waiting)
        first.close()
        wait_until(lambda: len(left) == 2)
        gate.let(math.inf)
        assert_alive(served)
        assert len(ran) == 2  # the first, and assert_alive's


def test_the_line_is_bounded_and_says_when_to_come_back(llm):
    with serve(llm, max_running=1, max_waiting=0) as served, held_steps(llm) as gate:
        gate.let()
        stream = served.client().completions.create(model=MODEL, stream=True, **LONG)
        next(stream)
        status, answer, headers = post(served, {"prompt": "x", "max_tokens": 1})
        assert status == 503 and int(headers["Retry-After"]) > 0
        assert answer["error"]["code"] == "overloaded"
        stream.close()
        gate.let(math.inf)
        wait_until(lambda: post(served, {"prompt": "x", "max_tokens": 1})[0] == 200)


@pytest.mark.parametrize("running", [1, 64])
def test_clients_at_the_same_time_all_get_their_own_answers(llm, running):
    with serve(llm, max_running=running) as served:
        texts = {}

        def ask(number):
            body = {"prompt": f"x = {number}\n", "max_tokens": 4, "temperature": 0}
            texts[number] = post(served, body)[1]["choices"][0]["text"]

        for thread in all_at_once(ask, *range(6)):
            thread.join()
        params = llm.default_params(temperature=0.0, max_tokens=4)
        assert texts == {number: llm.generate(f"x = {number}\n", params)[0].text for number in range(6)}


def test_clients_at_the_same_time_share_the_steps(llm, monkeypatch):
    with serve(llm) as served, held_steps(llm) as gate:
        arrived = calls_of(monkeypatch, Worker, "start")
        body = {"max_tokens": 6, "logit_bias": LONG["logit_bias"]}
        connections = [send(served, {**body, "prompt": f"x = {n}\n"}) for n in range(8)]
        wait_until(lambda: len(arrived) == 8)
        gate.let(math.inf)
        for connection in connections:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            connection.close()
        assert (
            6 <= gate.begun <= 7
        )  # the first step may have begun before all were there; one by one they take 48


def test_only_the_request_that_fails_within_a_shared_step_is_told_so(llm, monkeypatch):
    with serve(llm) as served:
        inner, shared = llm.engine.runner.step, set()

        def step(batch, cache):
            shared.add(len(batch))
            if any(request.params.seed == 13 and len(request.answer) == 3 for request in batch):
                raise KernelError("unlucky", code="kernel-refused")
            return inner(batch, cache)

        body = {"prompt": "import os\n", "max_tokens": 10, "temperature": 0}
        expected = post(served, body)[1]["choices"][0]["text"]
        monkeypatch.setattr(llm.engine.runner, "step", step)
        answers = {}

        def ask(seed):
            answers[seed] = post(served, {**body, "seed": seed})

        arrived = calls_of(monkeypatch, Worker, "start")
        with held_steps(llm):
            threads = all_at_once(ask, 12, 13, 14)
            wait_until(lambda: len(arrived) == 3)
        for thread in threads:
            thread.join()
        assert 3 in shared
        assert answers[13][0] == 500 and "unlucky" in answers[13][1]["error"]["message"]
        assert [answers[seed][1]["choices"][0]["text"] for seed in (12, 14)] == [expected] * 2
        assert llm.engine.idle


@pytest.mark.parametrize(
    "error", [KernelError("no kernel", code="kernel-refused"), ZeroDivisionError("oops")]
)
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_one_failing_request_leaves_the_server_alive(llm, monkeypatch, error, after, stream):
    with serve(llm) as served:
        free = len(llm.engine.cache.free)
        inner, calls = llm.engine.runner.step, []

        def step(*arguments):
            calls.append(1)
            if len(calls) > after:
                raise error
            return inner(*arguments)

        monkeypatch.setattr(llm.engine.runner, "step", step)
        expected = "no kernel" if isinstance(error, KernelError) else "internal error"
        if stream and after:  # the headers are out: the error is the last event
            with pytest.raises(openai.APIError, match=expected):
                list(served.client().completions.create(model=MODEL, stream=True, **LONG))
        else:
            status, answer, _ = post(served, {**LONG, "stream": stream})
            assert status == 500 and answer["error"]["type"] == "server_error"
            assert expected in answer["error"]["message"]
        monkeypatch.undo()
        assert len(llm.engine.cache.free) == free
        assert_alive(served)
