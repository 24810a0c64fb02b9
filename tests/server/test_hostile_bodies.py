"""What costs a server far more than its client (chunks, keys, numbers without measure), and ways around a check."""

from __future__ import annotations

import json
import threading

import h11
import pytest

from pymllm.server import connections
from pymllm.server.connections import EVENTS_A_TURN, MOST_CHUNKS, RequestReader
from pymllm.server.limits import Limits
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.server.protocol.base import MAX_ALL_KEYS, MAX_PARAMETERS, MAX_VALUES
from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.protocol.completions import CompletionRequest
from pymllm.server.protocol.responses import ResponsesRequest
from tests.processes import SECONDS
from tests.server.by_hand import all_at_once, assert_alive, connect, post
from tests.server.conftest import serve

START = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
BODY = b'{"prompt": "a", "max_tokens": 1}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


def answer_to(served, sent: bytes) -> bytes:
    """What the server says until it closes the connection, or until its answer is whole."""
    received = b""
    with connect(served) as connection:
        connection.sendall(sent)
        try:
            while more := connection.recv(1 << 16):
                received += more
        except ConnectionError:
            pass
    return received


# --- the body's length


def test_a_body_of_too_many_chunks_is_refused(served):
    refused = answer_to(
        served, START + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * (MOST_CHUNKS + 1)
    )
    assert refused.startswith(b"HTTP/1.1 413 ") and json.loads(refused.partition(b"\r\n\r\n")[2])["error"]
    assert_alive(served)


def test_others_have_their_turn_between_the_chunks_of_a_body():
    rests = []
    reader = RequestReader(1 << 16, lambda: rests.append(True))
    reader.receive_data(START + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 1000 + b"0\r\n\r\n")
    found = []
    while h11.EndOfMessage not in map(type, found):
        turn = list(iter(reader.next_event, h11.NEED_DATA)) if not found else []
        while found and (event := reader.next_event()) is not h11.NEED_DATA:
            turn.append(event)
            if type(event) is h11.EndOfMessage:
                break
        assert len([event for event in turn if type(event) is h11.Data]) <= EVENTS_A_TURN
        found += turn
        reader.go_on()
    assert b"".join(bytes(event.data) for event in found if type(event) is h11.Data) == b"a" * 1000
    assert len(rests) == 1000 // EVENTS_A_TURN


def test_a_body_in_chunks_that_come_in_many_turns_is_read_whole(served, monkeypatch):
    monkeypatch.setattr(connections, "EVENTS_A_TURN", 2)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    sent = START + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks
    assert answer_to(served, sent).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        (b"Transfer-Encoding: chunked\r\nContent-Length: %d\r\n" % len(CHUNKED), CHUNKED, 400),
        (b"Content-Length: %d\r\nContent-Length: 3\r\n" % len(BODY), BODY, 400),
        (b"Transfer-Encoding: gzip, chunked\r\n", CHUNKED, 400),
        (b"Transfer-Encoding: chunked\r\n", b"xyz\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n", CHUNKED, 200),
        (b"Content-Length: %d\r\nExpect: 100-continue\r\n" % len(BODY), BODY, 100),
    ],
)
def test_the_length_of_a_body_is_said_in_one_way(served, headers, body, status):
    answer = answer_to(served, START + headers + b"Connection: close\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert_alive(served)


def test_an_endless_body_of_a_refused_request_is_not_read_to_its_end(llm):
    with (
        serve(llm, api_key="secret", limits=Limits(body_bytes=1 << 14)) as served,
        connect(served) as connection,
        pytest.raises(ConnectionError),
    ):
        connection.sendall(START + b"Content-Length: %d\r\n\r\n" % (1 << 40))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
        for _ in range(1 << 14):
            connection.sendall(bytes(1 << 16))


# --- what is in it


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (b",".join(b'"a%d":1' % number for number in range(MAX_PARAMETERS + 1)), b"parameters"),
        (b'"metadata":{%s}' % b",".join(b'"%d":1' % number for number in range(5000)), b"too many keys"),
        (b'"metadata":[%s]' % b",".join([b'{"a":1}'] * (MAX_ALL_KEYS + 1)), b"too many keys"),
        (b'"prompt":[%s]' % b",".join([b"1"] * (MAX_VALUES + 2)), b"too many values"),
    ],
    ids=["parameters", "keys", "all keys", "values"],
)
def test_keys_and_values_have_a_measure(served, fields, what):
    status, answer, _ = post(served, b"{%s}" % fields)
    assert status == 400 and what.decode() in answer["error"]["message"]
    assert_alive(served)


def test_signs_in_a_text_are_no_keys_or_values(served):
    status, answer, _ = post(served, {"prompt": ',:"\\' * (MAX_VALUES + 1)})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_long_texts_hold_up_no_short_one(llm, served, monkeypatch):
    """More of them than there are threads for others' prompts."""
    held, began, own = threading.Event(), threading.Event(), llm.tokenizer.encoder.encode

    def encode(text, *settings):
        if len(text) > 60_000:
            began.set()
            assert held.wait(SECONDS)
        return own(text[:100], *settings)

    monkeypatch.setattr(llm.tokenizer.encoder, "encode", encode)
    long = {"prompt": "a " * 35_000, "max_tokens": 1, "truncate_prompt_tokens": 5}
    threads = all_at_once(lambda body: post(served, body), *[long] * 36)
    try:
        assert began.wait(SECONDS)
        assert post(served, {"prompt": "a", "max_tokens": 1})[0] == 200
    finally:
        held.set()
        for thread in threads:
            thread.join()


MESSAGES = [{"role": "user", "content": "a"}]
ASKED = {
    "/v1/completions": (CompletionRequest, {"prompt": "a", "max_tokens": 1}),
    "/v1/chat/completions": (ChatRequest, {"messages": MESSAGES, "max_tokens": 1}),
    "/v1/responses": (ResponsesRequest, {"input": "a", "max_output_tokens": 1}),
    "/v1/messages": (MessagesRequest, {"messages": MESSAGES, "max_tokens": 1}),
}
NUMBERS = (10**18, -(10**18), 1e300, -1e300)
# Of these every whole number that fits into 64 bits means something.
ANY_WHOLE = ("seed", "truncate_prompt_tokens")


def numeric_fields(kind) -> list[str]:
    """The parameters of a request that may be a number."""
    kinds = {name: str(field.annotation) for name, field in kind.model_fields.items()}
    return [name for name, words in kinds.items() if "int" in words or "float" in words]


@pytest.mark.parametrize("path", ASKED)
def test_no_number_is_too_large_to_be_refused_by_its_name(served, path):
    kind, body = ASKED[path]
    fields = numeric_fields(ChatRequest if kind is not CompletionRequest else kind)
    fields = [*dict.fromkeys((*fields, *numeric_fields(kind)))]
    assert len(fields) > 20
    for name in fields:
        for number in NUMBERS:
            status, answer, _ = post(served, {**body, name: number}, path)
            if status == 200 and name in ANY_WHOLE and isinstance(number, int):
                continue
            assert status == 400, (name, number, answer)
            assert name in answer["error"]["message"], (name, number, answer)
    assert_alive(served)


# --- ways around a check


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/HEALTH",
            "/health/",
            "/health;x",
            "//health",
            "/./health",
            "/health/..",
            "/health%00",
            "/health%20",
        ),
        *(
            "/%2e/health",
            "/page/../v1/models",
            "/page/%2e%2e/v1/models",
            "/v1/models",
            "/V1/models",
            "//v1/../health",
        ),
        *("/health/../metrics", "/metrics", "/plan", "/version", "/tokenize", "http://localhost/health", "*"),
    ],
)
def test_no_spelling_of_a_path_leads_around_the_key(keyed, target):
    answer = answer_to(
        keyed, b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target.encode()
    )
    assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 400 "))


@pytest.fixture(scope="module")
def keyed(llm):
    with serve(llm, api_key="secret") as served:
        yield served


@pytest.mark.parametrize("name", [b"Origin", b"Host"])
def test_a_page_cannot_bring_two_origins(served, name):
    values = (
        (b"http://evil.example", b"http://localhost")
        if name == b"Origin"
        else (b"evil.example", b"localhost")
    )
    for first, second in (values, values[::-1]):
        lines = b"%s: %s\r\n%s: %s\r\n" % (name, first, name, second)
        host = b"" if name == b"Host" else b"Host: localhost\r\n"
        answer = answer_to(
            served, b"GET /v1/models HTTP/1.1\r\n" + host + lines + b"Connection: close\r\n\r\n"
        )
        assert answer.startswith((b"HTTP/1.1 403 ", b"HTTP/1.1 400 "))


def test_errors_name_no_folder_of_the_server(llm, served):
    folder = str(llm.tokenizer.folder)
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        kept = llm.tokenizer.__dict__.get("chat_templates")
        llm.tokenizer.chat_templates = {}
        try:
            status, answer, _ = post(served, body, path)
        finally:
            del llm.tokenizer.chat_templates
            if kept is not None:
                llm.tokenizer.chat_templates = kept
        assert status == 400 and answer["error"]["message"]
        assert folder not in json.dumps(answer) and folder.rpartition("/")[0] not in json.dumps(answer)
