"""Calls of tools and thoughts, end to end, in the words of the Responses and the Messages API, and of /tokenize."""

from __future__ import annotations

import json
import shutil

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

import pymllm
from pymllm.api import shipped_model
from tests.processes import SECONDS

from .conftest import MODEL, serve
from .test_answers_of_parts import blocks_of
from .test_messages import events_of

EVENTS = TypeAdapter(ResponseStreamEvent)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "boolean"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FLAT = {"type": "function", "name": "weather", "description": "Tell the weather.", "parameters": SCHEMA}
OTHER = {"type": "function", "name": "clock", "parameters": {"type": "object", "additionalProperties": False}}
ANTHROPIC = {"name": "weather", "description": "Tell the weather.", "input_schema": SCHEMA}
CHAT = {"type": "function", "function": {name: value for name, value in FLAT.items() if name != "type"}}
SETTINGS = {"model": MODEL, "temperature": 0}
ASKED = {"input": "Weather in Oslo?", "tools": [FLAT, OTHER], "max_output_tokens": 120, **SETTINGS}
MESSAGES = [{"role": "user", "content": "Weather in Oslo?"}]
NAMED = {"type": "function", "name": "weather"}


@pytest.fixture
def anthropic(served):
    headers = {"x-api-key": "none", "anthropic-version": "2023-06-01"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=SECONDS) as client:
        yield client


def check_arguments(text):
    arguments = json.loads(text)
    assert arguments["city"] in ("Oslo", "Rome") and isinstance(arguments["days"], bool)
    return arguments


def test_a_named_function_is_called_in_a_response(client):
    whole = client.responses.create(tool_choice=NAMED, **ASKED)
    Response.model_validate(whole.model_dump(exclude_unset=True), strict=True)
    (call,) = [item for item in whole.output if item.type == "function_call"]
    assert call.name == "weather" and call.call_id and call.call_id != call.id
    check_arguments(call.arguments)
    assert (whole.status, call.status) == ("completed", "completed")
    assert [tool.name for tool in whole.tools] == ["weather", "clock"] and whole.tool_choice.name == "weather"
    events = list(client.responses.create(tool_choice=NAMED, stream=True, **ASKED))
    for event in events:
        EVENTS.validate_python(event.model_dump(exclude_unset=True), strict=True)
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == call.arguments
    done = next(event for event in events if event.type == "response.function_call_arguments.done")
    assert done.arguments == call.arguments
    final = events[-1].response
    assert [item.type for item in final.output] == [item.type for item in whole.output]


def test_a_response_s_call_and_its_result_go_back(client):
    first = client.responses.create(tool_choice="required", parallel_tool_calls=False, **ASKED)
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    history = [{"role": "user", "content": ASKED["input"]}, *first.output, result]
    asked = {**ASKED, "input": history, "tool_choice": "none", "max_output_tokens": 8}
    answer = client.responses.create(**asked)
    assert [item.type for item in answer.output] == ["message"]

    def count(output):
        items = [*history[:-1], {**result, "output": output}]
        return client.responses.input_tokens.count(
            model=MODEL, input=items, tools=ASKED["tools"]
        ).input_tokens

    # The model reads the result, and the call before it.
    assert count("rain") < count("rain and a little sunshine")
    said = client.responses.input_tokens.count(
        model=MODEL, input=[history[0]], tools=ASKED["tools"]
    ).input_tokens
    assert said + 10 < count("rain")


def test_the_parsed_arguments_of_the_official_client(client):
    strict = {**FLAT, "strict": True}
    asked = {**ASKED, "tools": [strict], "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(**asked) as stream:
        final = stream.get_final_response()
    called = [item for item in final.output if item.type == "function_call"]
    assert called and all(item.parsed_arguments["city"] in ("Oslo", "Rome") for item in called)


def test_a_tool_is_used_in_a_message(anthropic):
    asked = {
        "messages": MESSAGES,
        "tools": [ANTHROPIC],
        "tool_choice": {"type": "tool", "name": "weather"},
        "max_tokens": 120,
        **SETTINGS,
    }
    whole = anthropic.post("/v1/messages", json=asked).json()
    (use,) = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert (use["name"], whole["stop_reason"], set(use["input"])) == ("weather", "tool_use", {"city", "days"})
    events = events_of(anthropic, **asked)
    streamed = blocks_of(events)
    assert [json.loads(block["json"]) for block in streamed if block["type"] == "tool_use"] == [use["input"]]
    assert [block["type"] for block in streamed] == [block["type"] for block in whole["content"]]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert sum(event["type"] == "content_block_delta" for event in events) > 1
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "rain"}]}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": whole["content"]},
        {"role": "user", "content": [result]},
    ]
    later = {**asked, "messages": history, "tool_choice": {"type": "none"}, "max_tokens": 8}
    answer = anthropic.post("/v1/messages", json=later)
    assert answer.status_code == 200 and answer.json()["content"][0]["type"] == "text"


def test_a_call_that_is_cut_off_has_what_is_certain(anthropic):
    asked = {
        "messages": MESSAGES,
        "tools": [ANTHROPIC],
        "tool_choice": {"type": "any"},
        **SETTINGS,
    }
    for most in (6, 10, 14, 18):
        answer = anthropic.post("/v1/messages", json={**asked, "max_tokens": most}).json()
        assert answer["stop_reason"] == "max_tokens"
        for block in answer["content"]:
            assert block["type"] == "text" or set(block["input"]) <= {"city", "days"}


def test_calls_are_the_same_in_every_api(client, anthropic):
    chat = client.chat.completions.create(
        messages=MESSAGES,
        tools=[CHAT],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        **SETTINGS,
    )
    (expected,) = chat.choices[0].message.tool_calls
    response = client.responses.create(
        **{**ASKED, "tools": [FLAT]}, tool_choice="required", parallel_tool_calls=False
    )
    (item,) = [item for item in response.output if item.type == "function_call"]
    assert (item.name, item.arguments) == (expected.function.name, expected.function.arguments)
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked = {"messages": MESSAGES, "tools": [ANTHROPIC], "tool_choice": choice, "max_tokens": 120, **SETTINGS}
    message = anthropic.post("/v1/messages", json=asked).json()
    assert message["content"][0]["input"] == json.loads(expected.function.arguments)
    prompts = (chat.usage.prompt_tokens, response.usage.input_tokens)
    counted = anthropic.post(
        "/v1/messages/count_tokens", json={"model": MODEL, "messages": MESSAGES, "tools": [ANTHROPIC]}
    )
    tokens = anthropic.post("/tokenize", json={"messages": MESSAGES, "tools": [CHAT]})
    assert {*prompts, counted.json()["input_tokens"], tokens.json()["count"]} == {chat.usage.prompt_tokens}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [FLAT, FLAT]}, "tools"),
        ({"tools": [{**FLAT, "name": "a b"}]}, "tools"),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(client, asked, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{**ASKED, **asked})
    assert refused.value.body["param"] == param


def test_an_answer_goes_on_with_what_the_assistant_has_begun(anthropic, llm):
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    asked = {"messages": begun, "max_tokens": 8, **SETTINGS}
    answer = anthropic.post("/v1/messages", json=asked).json()
    ids = llm.tokenizer.apply_chat_template(begun, add_generation_prompt=False, continue_final_message=True)
    expected = llm.generate(ids, llm.default_params(temperature=0.0, max_tokens=8))[0]
    assert answer["content"][0]["text"] == expected.text
    count = anthropic.post("/v1/messages/count_tokens", json={"model": MODEL, "messages": begun}).json()
    assert count == {"input_tokens": len(ids)}
    tokens = anthropic.post(
        "/tokenize",
        json={"messages": begun, "continue_final_message": True, "add_generation_prompt": False},
    )
    assert tokens.json()["tokens"] == ids


THINKING = """{%- for message in messages %}[{{ message.role }}] {% if message.reasoning_content %}<think>{{
message.reasoning_content }}</think>{% endif %}{{ message.content }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% if enable_thinking is false %}<think></think>{% else %}<think>
{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """The shipped model with a template that opens thoughts, and reads whether it shall."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(shipped_model(), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = THINKING
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with serve(pymllm.LLM(str(folder), progress=False)) as running:
        yield running


def test_thoughts_are_told_apart_turned_off_and_sent_back(thinker):
    client = thinker.client()
    asked = {"model": MODEL, "max_output_tokens": 10, "temperature": 0, "input": "Hi"}
    response = client.responses.create(**asked)
    assert [item.type for item in response.output] == ["reasoning"]
    assert response.output[0].content[0].text and response.output_text == ""
    assert 0 < response.usage.output_tokens_details.reasoning_tokens <= 10
    assert [item.type for item in client.responses.create(reasoning={"effort": "none"}, **asked).output] == [
        "message"
    ]
    user = {"role": "user", "content": "Hi"}
    body = {"model": MODEL, "max_tokens": 10, "temperature": 0, "messages": [user]}

    def ask(**further):
        return httpx.post(f"{thinker.url}/v1/messages", json={**body, **further}, timeout=SECONDS).json()

    for thinking in ({}, {"thinking": {"type": "adaptive"}}):
        (block,) = ask(**thinking)["content"]
        assert block["type"] == "thinking" and block["signature"]
        assert block["thinking"] == response.output[0].content[0].text
    off = ask(thinking={"type": "disabled"})
    assert [block["type"] for block in off["content"]] == ["text"]
    # What was thought goes back to the template, which writes it.
    further = {"role": "user", "content": "And?"}
    counts = []
    for thought in (block, {**block, "thinking": block["thinking"] + " and more thoughts"}):
        messages = [
            user,
            {"role": "assistant", "content": [thought, {"type": "text", "text": "Yes"}]},
            further,
        ]
        count = httpx.post(
            f"{thinker.url}/v1/messages/count_tokens",
            json={"model": MODEL, "messages": messages},
            timeout=SECONDS,
        )
        counts.append(count.json()["input_tokens"])
    assert counts[0] < counts[1]


def test_thinking_asks_for_nothing_of_a_template_that_has_none(anthropic):
    body = {"messages": MESSAGES, "max_tokens": 4, **SETTINGS}
    plain = anthropic.post("/v1/messages", json=body).json()
    for thinking in ({"type": "enabled", "budget_tokens": 1024}, {"type": "disabled"}, {"type": "adaptive"}):
        answer = anthropic.post("/v1/messages", json={**body, "thinking": thinking}).json()
        assert answer["content"] == plain["content"]
