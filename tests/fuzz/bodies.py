"""HTTP requests: bodies of every endpoint, whole and as a stream, and headers, paths and clients that leave.

The application runs in the child that judges, with the shipped model. A request gets 200, or 4xx or 503 with its
endpoint's own form of an error; afterwards the server is healthy, and has its places and pages back. What asks for
nothing new has the same answer; a field that nobody knows is refused by its name.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pymllm.errors import RequestError

from .good_requests import CHAT, COMPLETIONS, GOOD, MESSAGES, STREAMS
from .inputs import NASTY, Input, changed_bytes, changed_json, chosen, dumped

BODY, CASE = "body", "case.json"

# Beside those of GOOD, what is known by GET, or by nobody.
PATHS = (
    *("/health", "/metrics", "/plan", "/version", "/v1/models", "/v1/models/shipped", "/", "/v1/models/../x"),
    *(
        "/v1/models/%00",
        "/v1/",
        "//v1/completions",
        "/v1/completions/",
        "/V1/COMPLETIONS",
        "/app.js",
        "/../app.py",
    ),
    *("/docs", "/openapi.json", "/" + "a" * 5000, "/v1/models/\u202e", "/v1/chat/completions;x"),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "get", "\x00", "A" * 99)
HEADERS = (
    *(
        "content-type",
        "content-length",
        "host",
        "origin",
        "authorization",
        "x-api-key",
        "accept",
        "x-request-id",
    ),
    *(
        "anthropic-version",
        "transfer-encoding",
        "connection",
        "cookie",
        "expect",
        "accept-encoding",
        "x" * 300,
        "",
    ),
)
VALUES = (
    *(
        "",
        "0",
        "-1",
        "1e3",
        "99999999999999999999",
        "\x00",
        "\xff\xfe",
        "a" * 9000,
        "text/html",
        "\r\nx: y",
        "%n",
    ),
    *(
        "application/json; charset=utf-16",
        "http://evil.example",
        "127.0.0.1",
        "[::1]:80",
        "Bearer ",
        "*/*",
        "null",
    ),
    *("chunked", "2023-06-01", "gzip", "١٢", "100-continue"),
)
# What asks for nothing, of the endpoints that generate.
NOTHING = (
    *({"frequency_penalty": None}, {"store": False}, {"user": None}, {"tools": []}, {"extra_body": {}}),
    *({"service_tier": "auto"}, {"echo": None}, {"priority": 0}),
)
# Names that no API has.
UNKNOWN = ("max_tokenz", "temprature", "x", "stop_at", "__class__", "model_", "a.b", "0", "é", "guided_jsonx")
# What differs between two answers to the same request.
OWN = re.compile(
    r'"(?:id|item_id|request_id|response_id|call_id)": ?"[^"]*"|"(?:created|created_at|completed_at)": ?[\d.]+'
    r'|(?:cmpl|chatcmpl|resp|msg|rs|fc)[-_][0-9a-zA-Z]+|"cached_tokens": ?\d+|"cache_\w+": ?\d+|"input_tokens": ?\d+'
)


@dataclass
class Reply:
    """What came back: the status, 0 without one, the headers and the body."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    messages: int = 0


class Bodies:
    """Asking the server."""

    name = "bodies"

    def __init__(self) -> None:
        self.app: Any = None
        self.known: dict[tuple[str, bool], str] = {}

    def prepare(self, folder: Path) -> None:
        # Here, once for all children; what has threads is made in each child.
        import pymllm.server.app  # noqa: F401

    def inputs(self) -> SearchStrategy[Input]:
        return chosen(
            (8, self._fields), (1, self._bytes), (2, self._nothing), (2, self._unknown), (2, self._http)
        )

    def _input(self, subject: str, body: bytes, changed: str, meaning: Any, **case: Any) -> Input:
        return Input(subject, {BODY: body, CASE: json.dumps(case).encode()}, changed, meaning)

    def _fields(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(GOOD)))
            path, good = GOOD[subject]
            streams = subject in STREAMS and draw(st.booleans())
            text, changed = draw(changed_json({**good, "stream": True} if streams else good, NASTY))
            # Some clients leave: at once, or while the answer comes.
            gone = draw(st.sampled_from((None,) * 8 + (0, 1, 2)))
            return self._input(subject, text, changed, "means", path=path, gone=gone)

        return make()

    def _bytes(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(GOOD)))
            path, good = GOOD[subject]
            text, changed = draw(changed_bytes(json.dumps(good).encode()))
            return self._input(subject, text, changed, "means", path=path)

        return make()

    def _nothing(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(STREAMS))
            path, good = GOOD[subject]
            stream = draw(st.booleans())
            body = {**good, "stream": True} if stream else good
            keys = draw(st.permutations(list(body)))
            added = draw(st.sampled_from(NOTHING)) if path in (COMPLETIONS, CHAT) else {}
            text = json.dumps(
                {**{key: body[key] for key in keys}, **{k: v for k, v in added.items() if k not in body}}
            )
            text = text.replace(": ", draw(st.sampled_from((":", " :\n", ":\t"))))
            changed = f"keys in another order, spaces, {added}"
            return self._input(subject, text.encode(), changed, "keeps", path=path, stream=stream)

        return make()

    def _unknown(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(GOOD)))
            path, good = GOOD[subject]
            name, value = draw(st.sampled_from(UNKNOWN)), draw(st.sampled_from((1, "x", True, [0], {"a": 1})))
            changed = f"an unknown field {name}"
            return self._input(
                subject, dumped({**good, name: value}), changed, "breaks", path=path, field=name
            )

        return make()

    def _http(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            subject = draw(st.sampled_from(sorted(GOOD)))
            path, good = GOOD[subject]
            headers = draw(
                st.lists(st.tuples(st.sampled_from(HEADERS), st.sampled_from(VALUES)).map(list), max_size=3)
            )
            method = draw(st.sampled_from(("POST",) * 6 + METHODS))
            path = draw(st.sampled_from((path,) * 30 + PATHS))
            pieces = draw(st.sampled_from((1, 1, 2, 9)))
            cut = draw(st.sampled_from((None, None, None, 0, 9)))
            case = {"path": path, "method": method, "headers": headers, "pieces": pieces, "cut": cut}
            return self._input(
                subject, dumped(good), f"{method} {path[:40]} {str(headers)[:60]}", "means", **case
            )

        return make()

    def judge(self, given: Input, folder: Path) -> bool:
        case = json.loads(given.files[CASE])
        try:
            return self._judge(given, case)
        except (RequestError, Ill):
            raise
        except BaseException:
            # The next input is asked of another server.
            self.app = None
            raise

    def _judge(self, given: Input, case: dict[str, Any]) -> bool:
        self._start()
        reply = self._ask(given.files[BODY], **case)
        self._check_after()
        left = case.get("gone") is not None or case.get("cut") is not None
        if left and reply.status in (0, 499):
            return True
        check(
            reply.status == 503 or 100 <= reply.status < 500 or reply.status == 529, f"status {reply.status}"
        )
        if reply.status >= 400:
            error = check_error(case["path"], reply, case.get("method", "POST"))
            name, told = case.get("field", ""), f"{error.get('param')} {error.get('message')}"
            check(name in told, f"{case['path']}: {name!r} is to blame, and the error says {told[:120]!r}")
            raise RequestError("refused", code=f"{reply.status} {error.get('code')}")
        if "text/event-stream" in reply.headers.get("content-type", "") and not left:
            check_events(reply.body)
        elif reply.headers.get("content-type", "").startswith("application/json") and reply.body:
            json.loads(reply.body)
        if given.meaning != "keeps":
            return False
        return same_text(reply.body) == self._good(given.subject, bool(case.get("stream")))

    def _good(self, subject: str, stream: bool) -> str:
        """Return the answer to an unchanged request."""
        if (subject, stream) not in self.known:
            path, good = GOOD[subject]
            body = {**good, "stream": True} if stream else good
            reply = self._ask(json.dumps(body).encode(), path=path)
            check(reply.status == 200, f"the unchanged {subject} got {reply.status}: {reply.body[:300]!r}")
            self.known[subject, stream] = same_text(reply.body)
        return self.known[subject, stream]

    def _start(self) -> None:
        if self.app is not None:
            return
        import logging

        from pymllm import LLM
        from pymllm.api import shipped_model
        from pymllm.server.app import create_app

        logging.getLogger("pymllm").setLevel(logging.CRITICAL)
        self.loop = asyncio.new_event_loop()
        self.app = create_app(LLM(shipped_model(), max_model_len=256, kv_memory="8MB"), model_name="shipped")
        self.worker = self.app.state.service.worker
        self.cache = self.app.state.service.llm.engine.cache

    def _ask(self, body: bytes, **case: Any) -> Reply:
        return self.loop.run_until_complete(ask(self.app, body, **case))

    def _check_after(self) -> None:
        """See that the server is healthy and has everything back, now or in a moment."""
        try:
            self._check_well()
        except Ill as ill:
            raise RuntimeError(str(ill)) from None

    def _check_well(self) -> None:
        reply = self._ask(b"", path="/health", method="GET")
        check(reply.status == 200, f"/health: {reply.status} {reply.body[:200]!r}")
        places, end = self.worker.places, time.monotonic() + 20
        while places.free < places.capacity or self.cache.available < self.cache.num_pages:
            free = f"{places.free} of {places.capacity} places, {self.cache.available} of {self.cache.num_pages} pages"
            check(time.monotonic() < end, f"only {free} came back")
            self.loop.run_until_complete(asyncio.sleep(0.001))


async def ask(
    app: Any,
    body: bytes,
    *,
    path: str,
    method: str = "POST",
    headers: Iterable[Iterable[str]] = (),
    pieces: int = 1,
    cut: int | None = None,
    gone: int | None = None,
    **_: Any,
) -> Reply:
    """Send a request to an application, and return what comes back.

    pieces: in how many the body comes.  cut: how many bytes of it come before the client leaves.  gone: how many
    messages of the response come before it does.
    """
    reply = Reply()
    size = max(1, -(-len(body) // pieces))
    waiting = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    if cut is not None:
        waiting = [body[:cut]]
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if waiting:
            piece = waiting.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(waiting) or cut is not None}
        if cut is None and gone != 0:
            await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        reply.messages += 1
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]
            }
        elif message["type"] == "http.response.body":
            reply.body += message.get("body", b"")
        if gone is not None and reply.messages >= gone:
            left.set()

    sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    given = [(name.lower().encode("utf-8"), value.encode("utf-8")) for name, value in headers]
    sent = [pair for pair in sent if pair[0] not in dict(given)]
    host = [] if b"host" in dict(given) else [(b"host", b"127.0.0.1:8000")]
    scope = {
        **{
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "root_path": "",
        },
        **{"method": method, "path": path, "raw_path": path.encode("utf-8"), "query_string": b""},
        **{
            "headers": [*host, *sent, *given],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
            "state": {},
        },
    }
    try:
        await asyncio.wait_for(app(scope, receive, send), 60)
    except OSError:
        check(gone is not None or cut is not None, "the connection ended")
    return reply


class Ill(AssertionError):
    """An answer that is not of its form, of a server that goes on."""


def check(holds: bool, what: str) -> None:
    """Make a finding of what does not hold."""
    if not holds:
        raise Ill(what)


def check_error(path: str, reply: Reply, method: str) -> dict[str, Any]:
    """Check the form of an error, as the endpoint's clients know it.  Returns it."""
    if method == "HEAD" or not reply.body:
        return {}
    told = json.loads(reply.body)
    check(isinstance(told, dict) and isinstance(told.get("error"), dict), f"no error: {reply.body[:200]!r}")
    error = told["error"]
    check(isinstance(error.get("type"), str) and isinstance(error.get("message"), str), f"{error}")
    if path == MESSAGES or path.startswith(f"{MESSAGES}/"):
        check(told.get("type") == "error", f"not in Anthropic's form: {told}")
        return {**error, "code": (error.get("details") or {}).get("error_code")}
    if told.get("type") != "error":
        check({"param", "code"} <= error.keys(), f"not in OpenAI's form: {error}")
    return error


def check_events(body: bytes) -> None:
    """Check a stream: every event is JSON, and it comes to its end."""
    events = [event for event in body.decode("utf-8").split("\n\n") if event]
    check(body.endswith(b"\n\n") and bool(events), f"a stream ends with {body[-80:]!r}")
    kinds = []
    for event in events:
        lines = [line for line in event.split("\n") if not line.startswith(":")]
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        check(len(data) <= 1 and len(names) + len(data) == len(lines), f"no event: {event[:200]!r}")
        if data and data[0] != "[DONE]":
            value = json.loads(data[0])
            kinds.append(value.get("type") or ("error" if "error" in value else "chunk"))
        elif data:
            kinds.append("done")
    check(
        kinds[-1]
        in ("done", "message_stop", "response.completed", "response.incomplete", "response.failed", "error"),
        f"a stream ends with {kinds[-3:]}",
    )


def same_text(body: bytes) -> str:
    """Leave out of an answer what is its own."""
    return OWN.sub('""', body.decode("utf-8"))
