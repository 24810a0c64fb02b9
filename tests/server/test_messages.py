"""/v1/messages as Anthropic documents it, over a real socket."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from pymllm.server.anthropic_words import AnthropicWords
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.server.protocol.base import read_request
from tests.processes import SECONDS

from .conftest import MODEL, serve

HEADERS = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
USER = {"role": "user", "content": "Write a function."}
ASKED = {"model": MODEL, "max_tokens": 12, "temperature": 0, "messages": [USER]}
WEATHER = {
    "name": "weather",
    "description": "Tell the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}

BOOLEAN = {"type": "json_schema", "schema": {"type": "boolean"}}


@pytest.fixture
def anthropic(served):
    with httpx.Client(base_url=served.url, headers=HEADERS, timeout=SECONDS) as client:
        yield client


def ask(client, path="/v1/messages", **asked):
    answer = client.post(path, json={**ASKED, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(client, **asked):
    answer = client.post("/v1/messages", json={**ASKED, "stream": True, **asked})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.strip().split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if not lines:
            continue
        name, data = (line.partition(": ")[2] for line in lines)
        events.append(json.loads(data))
        assert events[-1]["type"] == name
    return events


def greedy(llm, messages, **settings):
    ids = llm.tokenizer.apply_chat_template(messages)
    return llm.generate(ids, llm.default_params(**{"temperature": 0.0, "max_tokens": 12, **settings}))[0]


def test_an_answer_is_what_the_model_generates(anthropic, llm):
    expected = greedy(llm, [USER])
    answer = ask(anthropic)
    assert answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", MODEL)
    assert answer["content"] == [{"type": "text", "text": expected.text}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(expected.prompt_token_ids)
    assert usage["output_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("stops", [None, 4])
def test_events_add_up_to_the_whole_answer(anthropic, llm, stops):
    text = greedy(llm, [USER]).text
    asked = {} if stops is None else {"stop_sequences": ["never said", text[stops : stops + 3]]}
    whole, events = ask(anthropic, **asked), events_of(anthropic, **asked)
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["text"] for delta in deltas) == whole["content"][0]["text"] == text[:stops]
    start, ending = events[0]["message"], events[-2]
    assert ending["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    reason = "max_tokens" if stops is None else "stop_sequence"
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == (None if stops is None else asked["stop_sequences"][1])
    assert ending["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    for name in ("input_tokens", "cache_read_input_tokens"):
        assert start["usage"][name] == ending["usage"][name]


def test_blocks_and_a_system_prompt_are_a_chat(anthropic, llm):
    first = ask(anthropic)
    text = first["content"][0]["text"]
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    later = {
        "system": [{"type": "text", "text": "Be brief.", **cached}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Write a function.", **cached}]},
            {"role": "assistant", "content": first["content"]},
            {"role": "user", "content": "More."},
        ],
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": text},
        {"role": "user", "content": "More."},
    ]
    expected = greedy(llm, messages)
    answer = ask(anthropic, **later)
    assert answer["content"][0]["text"] == expected.text
    count = anthropic.post("/v1/messages/count_tokens", json={"model": MODEL, **later})
    assert count.json() == {"input_tokens": len(expected.prompt_token_ids)}
    again = ask(anthropic, **later)["usage"]
    assert again["cache_read_input_tokens"] > 0
    assert again["input_tokens"] + again["cache_read_input_tokens"] == len(expected.prompt_token_ids)


def test_a_system_s_message_may_come_among_the_others(anthropic, llm):
    texts = [{"role": "system", "content": "Be brief."}, USER]
    in_blocks = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER]
    said = [ask(anthropic, messages=messages)["content"][0]["text"] for messages in (texts, in_blocks)]
    assert said == [greedy(llm, texts).text] * 2


def test_a_schema_binds_the_answer(anthropic):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    config = {"format": {"type": "json_schema", "schema": schema}}
    answer = ask(anthropic, output_config=config, max_tokens=40)
    assert json.loads(answer["content"][0]["text"])["x"] in (True, False)
    old = ask(anthropic, output_format=config["format"], max_tokens=40)
    assert old["content"] == answer["content"]


def test_what_asks_for_nothing_is_accepted(anthropic):
    asked = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "stop_sequences": [],
        "tools": [],
        "tool_choice": {"type": "auto"},
        "top_k": 0,
        "top_p": 1.0,
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": []},
        "container": None,
        "mcp_servers": [],
        "seed": 4,
        "output_config": {"effort": "high"},
        "stream": False,
    }
    assert ask(anthropic, **asked)["type"] == "message"
    answer = anthropic.post("/v1/messages?beta=true", json=ASKED, headers={"anthropic-beta": "x-2025-01-01"})
    assert answer.status_code == 200


def said(block):
    return {"messages": [{"role": "user", "content": [block]}]}


REFUSED = [
    ("max_tokens", {"max_tokens": None}),
    ("max_tokens", {"max_tokens": 0}),
    ("messages", {"messages": []}),
    ("messages.0.role", {"messages": [{"role": "developer", "content": "Be brief."}]}),
    (
        "'tool_use' (at messages.0.content.0)",
        {"messages": [{"role": "system", "content": [{"type": "tool_use"}]}]},
    ),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("'image' (at messages.0.content.0)", said({"type": "image", "source": {"type": "url", "url": "x"}})),
    ("'document' (at messages.0.content.0)", said({"type": "document", "source": {}})),
    ("'tool_use' (at messages.0.content.0)", said({"type": "tool_use", "id": "a", "name": "b", "input": {}})),
    ("messages.0.content.0.tool_use_id", said({"type": "tool_result", "content": "7"})),
    (
        "'image' (at messages.0.content.0.content.0)",
        said({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
    ),
    (
        "results of the tools",
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]},
            ]
        },
    ),
    ("messages", {"messages": [{"role": "assistant", "content": ""}]}),
    ("system", {"system": [{"type": "image"}]}),
    (
        "'web_search_20250305' (at tools.0)",
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    ),
    ("tools.0.input_schema", {"tools": [{"name": "f"}]}),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "tool"}}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("thinking", {"thinking": {"type": "sometimes"}}),
    ("output_config", {"output_config": {"format": {"type": "regex"}}}),
    ("output_config", {"output_config": {"effort": "low"}}),
    ("stop_sequences", {"stop_sequences": ["x" * 300]}),
    ("service_tier", {"service_tier": "priority"}),
    ("container", {"container": "c"}),
    ("thread", {"thread": {"type": "create"}}),
    ("metadata", {"metadata": {"trace": "1"}}),
    ("mcp_servers", {"mcp_servers": [{"type": "url"}]}),
    ("n", {"n": 2}),
    ("temperature", {"temperature": -1}),
    ("thinking", {"thinking": {"budget": 1}, "stream": True}),
    ("stop and stop_sequences", {"stop": ["a"], "stop_sequences": ["b"]}),
    ("stop is", {"stop": ["x" * 300]}),
    ("output_format and", {"output_format": BOOLEAN, "output_config": {"format": BOOLEAN}}),
    ("output_format (or", {"output_format": BOOLEAN, "guided_regex": "a"}),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "auto", "name": "weather"}}),
]


@pytest.mark.parametrize(("named", "asked"), REFUSED, ids=lambda one: None)
def test_what_cannot_be_honoured_is_refused_by_name(anthropic, named, asked):
    answer = anthropic.post("/v1/messages", json={**ASKED, **asked})
    assert answer.status_code == 400
    body = answer.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]


def test_a_request_that_is_refused_leaves_nothing_that_runs(anthropic, served):
    asked = {"stream": True, "ignore_eos": True, "max_tokens": 900, "thinking": {"type": "perhaps"}}
    assert anthropic.post("/v1/messages", json={**ASKED, **asked}).status_code == 400
    places = served.app.state.service.worker.places
    assert places.free == places.capacity
    counted = anthropic.post("/v1/messages/count_tokens", json={"messages": [USER], "thinking": {"a": 1}})
    assert counted.status_code == 400


def test_a_chat_s_own_parameters_may_come_along(anthropic):
    asked = {"stop_sequences": ["e"], "max_tokens": 60, "include_stop_str_in_output": True}
    answer = ask(anthropic, **asked, skip_special_tokens=False)
    assert answer["stop_sequence"] == "e" and answer["content"][0]["text"].endswith("e")


def test_errors_are_of_anthropic_s_shape(anthropic):
    def kind(answer):
        body = answer.json()
        assert body["type"] == "error" and body["error"]["message"]
        assert int(answer.headers["content-length"]) == len(answer.content)
        return answer.status_code, body["error"]["type"]

    assert kind(anthropic.post("/v1/messages", json={**ASKED, "model": "claude"})) == (404, "not_found_error")
    assert kind(anthropic.post("/v1/messages", content=b"{")) == (400, "invalid_request_error")
    thread = anthropic.post("/v1/messages", json={**ASKED, "thread": {"type": "create"}})
    assert thread.json()["request_id"] == thread.headers["request-id"] == thread.headers["x-request-id"]
    answer = anthropic.post("/v1/messages", json=ASKED)
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert thread.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
    assert kind(anthropic.get("/v1/messages")) == (405, "invalid_request_error")
    assert kind(anthropic.post("/v1/messages/batches", json={})) == (404, "not_found_error")
    large = json.dumps({**ASKED, "messages": [{"role": "user", "content": "x" * (5 << 20)}]})
    assert kind(anthropic.post("/v1/messages", content=large)) == (413, "request_too_large")
    long = [{"role": "user", "content": "word " * 3000}]
    answer = anthropic.post("/v1/messages", json={**ASKED, "messages": long})
    assert kind(answer) == (400, "invalid_request_error") and "messages" in answer.json()["error"]["message"]


def test_the_key_comes_as_anthropic_s_clients_send_it(llm):
    with serve(llm, api_key="secret", max_running=1, max_waiting=0) as running:
        url = f"{running.url}/v1/messages"

        def answer(**headers):
            return httpx.post(url, json=ASKED, headers=headers, timeout=SECONDS)

        wrong = answer(**{"x-api-key": "wrong"})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
        assert answer(**{"x-api-key": "secret"}).status_code == 200
        assert answer(authorization="Bearer secret").status_code == 200
        # Another key beside the bearer's does not help.
        assert answer(**{"authorization": "Bearer wrong", "x-api-key": "secret"}).status_code == 401
        headers = {**HEADERS, "x-api-key": "secret"}
        models = httpx.get(f"{running.url}/v1/models", headers=headers, timeout=SECONDS).json()
        assert [card["id"] for card in models["data"]] == [MODEL] and models["has_more"] is False
        assert models["data"][0]["type"] == "model" and models["data"][0]["created_at"].endswith("+00:00")


def test_a_server_that_is_full_says_so_in_anthropic_s_words(llm):
    with serve(llm, max_running=1, max_waiting=0) as running:
        url = f"{running.url}/v1/messages"
        long = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=long, timeout=SECONDS) as first:
            assert first.status_code == 200
            answer = httpx.post(url, json=ASKED, timeout=SECONDS)
            assert answer.status_code == 529 and int(answer.headers["retry-after"]) > 0
            assert answer.json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("begun", [False, True])
def test_a_defect_is_told_in_anthropic_s_words_unless_an_answer_has_begun(begun):
    start = {"type": "http.response.start", "status": 200, "headers": []}

    async def broken(scope, receive, send):
        if begun:
            await send(start)
        raise ZeroDivisionError

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/messages", "headers": []}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(AnthropicWords(broken)(scope, None, send))
    if begun:
        assert sent == [start]
        return
    assert sent[0]["status"] == 500
    error = {"type": "api_error", "message": "internal error"}
    assert json.loads(sent[1]["body"]) == {"type": "error", "error": error}


def test_results_calls_and_thoughts_become_a_chat_s_messages():
    assistant = [
        {"type": "thinking", "thinking": "I must look.", "signature": "abc"},
        {"type": "redacted_thinking", "data": "opaque"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "t1", "name": "weather", "input": {}},
        {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Öslo", "no": None}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
        {
            "type": "tool_result",
            "tool_use_id": "t2",
            "is_error": True,
            "content": [{"type": "text", "text": "?"}],
        },
        {"type": "tool_result", "tool_use_id": "t3"},
        {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
    ]
    asked = {
        "max_tokens": 5,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": results},
            {"role": "assistant", "content": [assistant[2], assistant[2]]},
        ],
        "tools": [{**WEATHER, "type": "custom", "cache_control": {"type": "ephemeral"}}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "stop_sequences": ["END"],
        "top_k": 7,
    }
    request = read_request(MessagesRequest, asked)
    system, user, answer, *rest = request.messages_of_chat()
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "Weather?"}
    inputs = [json.loads(call["function"].pop("arguments")) for call in answer["tool_calls"]]
    assert inputs == [{}, {"city": "Öslo", "no": None}]
    calls = [{"id": name, "type": "function", "function": {"name": "weather"}} for name in ("t1", "t2")]
    assert answer == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "I must look.",
        "tool_calls": calls,
    }
    assert rest[:-1] == [
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error:\n?"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "And now?"},
    ]
    assert rest[-1] == {"role": "assistant", "content": "I look.I look."}
    parameters = request.parameters_of_chat()
    function = {"name": "weather", "description": "Tell the weather.", "parameters": WEATHER["input_schema"]}
    assert parameters["tools"] == [{"type": "function", "function": function}]
    assert (parameters["tool_choice"], parameters["parallel_tool_calls"]) == ("required", False)
    assert request.wants_thoughts is True
    assert (parameters["stop"], parameters["top_k"], parameters["max_tokens"]) == (["END"], 7, 5)
    # The last message is the assistant's: the answer goes on with it.
    assert (parameters["continue_final_message"], parameters["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize("content", ["", []])
def test_an_empty_answer_at_the_end_asks_for_nothing(content):
    asked = {**ASKED, "messages": [USER, {"role": "assistant", "content": content}]}
    request = read_request(MessagesRequest, asked)
    assert request.messages_of_chat() == [USER]
    assert "continue_final_message" not in request.parameters_of_chat()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
    ],
)
def test_choices_of_tools_are_a_chat_s(choice, expected):
    asked = {**ASKED, "tools": [WEATHER], "tool_choice": choice}
    assert read_request(MessagesRequest, asked).parameters_of_chat()["tool_choice"] == expected
