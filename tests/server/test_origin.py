"""A web page from elsewhere cannot ask a server of this machine that needs no key."""

from __future__ import annotations

import json

import pytest

from pymllm.server.origin import is_loopback, name_of
from tests.server.by_hand import get, post
from tests.server.conftest import serve


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:{port}", None, 200),
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),  # our own page
        ("LOCALHOST:{port}", "http://localhost:{port}", 200),
        ("app.localhost", None, 200),
        ("[::1]:{port}", None, 200),
        ("127.1.2.3", None, 200),
        ("evil.example", None, 403),
        ("evil.example:{port}", "http://evil.example:{port}", 403),  # a name that points here
        ("localhost.evil.example", None, 403),
        ("evil.example@localhost", None, 403),
        ("localhost/x", None, 403),
        ("", None, 403),
        ("[::2]", None, 403),
        ("localhost:{port}", "https://evil.example", 403),
        ("localhost:{port}", "null", 403),
        ("localhost:{port}", "http://localhost:1", 403),  # another server's page
        ("localhost:{port}", "http://localhost:{port}.evil.example", 403),
    ],
)
def test_a_foreign_host_or_origin_is_refused_on_loopback_without_a_key(served, host, origin, status):
    headers = {"Host": host.format(port=served.port)}
    if origin is not None:
        headers["Origin"] = origin.format(port=served.port)
    found, answer, _ = get(served, "/v1/models", headers=headers)
    assert found == status
    found, answer, _ = post(served, {"prompt": "x", "max_tokens": 1}, headers=headers)
    assert found == status
    if status == 403:
        assert (answer["error"]["code"], answer["error"]["type"]) == (
            "foreign_origin",
            "invalid_request_error",
        )
    assert get(served, "/health", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("settings", "host", "origin", "status"),
    [
        ({"allowed_hosts": ["llm.example"]}, "llm.example:80", None, 200),
        ({"allowed_hosts": ["llm.example"]}, "llm.example", "http://llm.example", 200),
        ({"allowed_hosts": ["llm.example"]}, "other.example", None, 403),
        ({"allowed_hosts": ["*"]}, "other.example", None, 200),
        ({"allowed_hosts": ["*"]}, "other.example", "http://evil.example", 403),
        ({"cors": ["https://chat.example"]}, "localhost", "https://chat.example", 200),
        ({"cors": ["https://chat.example"]}, "localhost", "https://evil.example", 403),
        ({"cors": ["*"]}, "localhost", "https://evil.example", 200),
        ({"cors": ["*"]}, "evil.example", "https://evil.example", 403),
        ({"api_key": "secret"}, "evil.example", "https://evil.example", 200),
    ],
)
def test_who_else_may_ask_is_the_operator_s_choice(llm, settings, host, origin, status):
    headers = {"Host": host, "Authorization": "Bearer secret"} | ({"Origin": origin} if origin else {})
    with serve(llm, **settings) as served:
        assert get(served, "/v1/models", headers=headers)[0] == status


def test_browsers_are_told_which_pages_may_ask(llm):
    page = "https://chat.example"
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with serve(llm, cors=[page], api_key="secret") as served:
        status, _, headers = get(served, "/v1/chat/completions", "OPTIONS", {"Origin": page, **asked})
        assert status == 200 and headers["Access-Control-Allow-Origin"] == page
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert "authorization" in headers["Access-Control-Allow-Headers"].lower()
        status, _, headers = get(
            served, "/v1/chat/completions", "OPTIONS", {"Origin": "https://evil.example", **asked}
        )
        assert status == 400 and "Access-Control-Allow-Origin" not in headers
        # Refusals too: a page could not read them otherwise.
        status, body, headers = get(served, "/v1/models", headers={"Origin": page})
        assert status == 401 and headers["Access-Control-Allow-Origin"] == page
        assert "X-Request-Id" in headers["Access-Control-Expose-Headers"] and json.loads(body)["error"]
    with serve(llm) as served:
        status, body, headers = get(served, "/v1/chat/completions", "OPTIONS")
        assert (status, headers["Allow"]) == (405, "POST") and json.loads(body)["error"]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("a.example:80", "a.example"),
        ("[::1]:80", "::1"),
        ("a:b", None),
        ("a:99999", None),
        ("[::1", None),
        (" ", " "),
        ("", None),
    ],
)
def test_the_name_in_a_host_header(host, name):
    assert name_of(host) == name


def test_loopback_names():
    mine = ("localhost", "localhost.", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1")
    assert all(is_loopback(name) for name in mine)
    others = ("example.org", "localhost.example.org", "128.0.0.1", "0.0.0.0", "::", "notlocalhost", "")
    assert not any(is_loopback(name) for name in others)
