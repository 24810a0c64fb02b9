"""Request ids, the access log, and methods that no route has."""

from __future__ import annotations

import io
import json
import threading

import pytest

from pymllm.server.access_log import WAITING_LINES, AccessLog
from tests.server.by_hand import get, post, wait_until
from tests.server.conftest import serve


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123_x.y:z", True), ("a" * 129, False), ("two words", False), ("a\x7fb", False), ("é", False)],
)
def test_a_request_has_an_id_its_client_s_own_if_that_is_sane(served, sent, kept):
    for status, _, headers in (
        get(served, "/v1/models", headers={"X-Request-Id": sent.encode("latin-1")}),
        post(served, {"prompt": ""}, headers={"X-Request-Id": sent.encode("latin-1")}),
    ):
        assert status in (200, 400)
        made = headers["X-Request-Id"]
        assert made == sent if kept else (len(made) == 32 and made != sent)


def test_ids_that_are_made_differ_and_errors_have_them_too(llm, monkeypatch):
    with serve(llm, api_key="secret") as served:
        ids = {get(served, path)[2]["X-Request-Id"] for path in ("/health", "/health", "/v1/models", "/no")}
        assert len(ids) == 4

        def broken(*_):
            raise ZeroDivisionError

        monkeypatch.setattr(served.app.state.service, "read", broken)
        key = {"Authorization": "Bearer secret", "X-Request-Id": "mine"}
        status, _, headers = post(served, {"prompt": "x"}, headers=key)
        assert (status, headers["X-Request-Id"]) == (500, "mine")
        assert served.app.state.traffic.answered["POST", "/v1/completions", 500] == 1


def lines_of(llm, kind, work, lines):
    """What is logged of some requests."""
    written = io.StringIO()
    with serve(llm, access_log=AccessLog(written, kind)) as served:
        work(served)
        wait_until(lambda: written.getvalue().count("\n") == lines)
    return written.getvalue().splitlines()


def test_the_access_log_has_a_line_for_each_request_in_json(llm):
    def work(served):
        post(served, {"prompt": ["x = 1", "y"], "max_tokens": 3, "logit_bias": {"0": -100, "2": -100}})
        client = served.client()
        list(client.completions.create(model="shipped", prompt="x", max_tokens=2, stream=True))
        get(served, "/v1/no\x1b[31m/such?secret=1".replace("\x1b", "%1b"), "GET")
        get(served, "/health", "HEAD", {"X-Request-Id": "probe-1"})

    records = [json.loads(line) for line in lines_of(llm, "json", work, 4)]
    assert [(one["method"], one["path"], one["status"]) for one in records] == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 200),
        ("GET", "other", 404),
        ("HEAD", "/health", 200),
    ]
    encode = llm.tokenizer.encode
    assert records[0]["prompt_tokens"] == len(encode("x = 1")) + len(encode("y"))
    assert records[0]["completion_tokens"] == 6
    assert 1 <= records[1]["completion_tokens"] <= 2
    assert records[3]["request_id"] == "probe-1" and "prompt_tokens" not in records[3]
    assert all(one["client"] == "127.0.0.1" and one["ms"] >= 0 for one in records)


def test_the_access_log_as_text_has_no_text_of_a_client_s(llm):
    def work(served):
        forged = "1.2.3.4 GET /v1/models 200\\n\x1b[2J"
        get(served, "/v1/" + "A" * 500, "BREW", {"X-Forwarded-For": forged, "X-Request-Id": "a b"})
        post(served, {"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "mine"})

    first, second = lines_of(llm, "text", work, 2)
    assert " other other 404 " in first and "AAAA" not in first and "\x1b" not in first
    assert len(first.split()) == 8 and "BREW" not in first
    assert second.endswith(" tokens mine") and " POST /v1/completions 200 " in second


def test_nobody_waits_for_a_log_that_is_not_read():
    read, wrote = threading.Event(), []

    class Pipe(io.StringIO):
        def write(self, text):
            read.wait()
            wrote.append(text)
            return len(text)

    record = {
        "time": 0.0,
        "client": "x",
        "method": "GET",
        "path": "/",
        "status": 200,
        "ms": 1,
        "request_id": "i",
    }
    log = AccessLog(Pipe(), "json")
    for _ in range(WAITING_LINES + 100):
        log.write(record)
    read.set()
    log_lines = WAITING_LINES + 1  # one was being written
    wait_until(lambda: len(wrote) >= log_lines)
    assert any("lines of the access log were dropped" in line for line in wrote)


def test_head_is_get_without_a_body_and_other_methods_are_named(served):
    status, body, headers = get(served, "/v1/models", "HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 0
    for path, method, allowed in (
        ("/v1/completions", "GET", "POST"),
        ("/v1/completions", "HEAD", "POST"),
        ("/v1/models", "DELETE", "GET"),
        ("/health", "POST", "GET"),
    ):
        status, body, headers = get(served, path, method)
        assert status == 405 and allowed in headers["Allow"].split(", ")
        assert method == "HEAD" or json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_model_may_have_several_names(llm):
    with serve(llm, other_names=["gpt-4o", "shipped"]) as served:
        assert [model.id for model in served.client().models.list().data] == ["shipped", "gpt-4o"]
        for name in ("shipped", "gpt-4o"):
            status, answer, _ = post(served, {"model": name, "prompt": "x", "max_tokens": 1})
            assert (status, answer["model"]) == (200, "shipped")
        assert post(served, {"model": "gpt-4", "prompt": "x"})[0] == 404
