"""/v1/responses with the official client: what it asks for is what the model answers."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from pymllm.errors import RequestError
from pymllm.server.protocol.base import read_request
from pymllm.server.protocol.responses import ResponsesRequest

MODEL = "shipped"
SETTINGS = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
USER = {"role": "user", "content": "Write a function."}
EVENTS = TypeAdapter(ResponseStreamEvent)
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}


def greedy(llm, messages, **settings):
    ids = llm.tokenizer.apply_chat_template(messages)
    settings = {"temperature": 0.0, "max_tokens": 12, **settings}
    return llm.generate(ids, llm.default_params(**settings))[0]


def check(response):
    """Hold an answer against the client's types, as strictly as they are."""
    Response.model_validate(response.model_dump(exclude_unset=True), strict=True)
    return response


def test_an_answer_is_what_the_model_generates(client, llm):
    answer = check(client.responses.create(input="Write a function.", **SETTINGS))
    expected = greedy(llm, [USER])
    assert answer.output_text == expected.text
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.usage.input_tokens == len(expected.prompt_token_ids)
    assert answer.usage.output_tokens == len(expected.token_ids) == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    assert (answer.temperature, answer.store, answer.model) == (0, False, MODEL)
    short = llm.default_params(temperature=0.0, max_tokens=12, stop=(expected.text[4:6],))
    ended = client.responses.create(input="Write a function.", **SETTINGS, extra_body={"stop": short.stop[0]})
    assert (ended.status, ended.output[0].status) == ("completed", "completed")
    assert ended.output_text == expected.text[:4]


def test_events_add_up_to_the_whole_answer(client):
    whole = client.responses.create(input="Write a function.", **SETTINGS)
    events = list(client.responses.create(input="Write a function.", stream=True, **SETTINGS))
    for event in events:
        EVENTS.validate_python(event.model_dump(exclude_unset=True), strict=True)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1 and "".join(deltas) == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    asked = {name: value for name, value in SETTINGS.items() if name != "max_output_tokens"}
    stop = {"stop": whole.output_text[4:6]}
    with client.responses.stream(input="Write a function.", **asked, extra_body=stop) as stream:
        final = stream.get_final_response()
    assert final.output_text == whole.output_text[:4] and final.status == "completed"


def test_a_conversation_of_items_is_a_chat(client, llm):
    first = client.responses.create(input="Write a function.", **SETTINGS)
    later = {"role": "user", "content": [{"type": "input_text", "text": "More."}]}
    as_items = [{"type": "message", **USER}, *[item.model_dump() for item in first.output], later]
    answer = client.responses.create(instructions="Be brief.", input=as_items, **SETTINGS)
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More."},
    ]
    assert answer.output_text == greedy(llm, messages).text
    assert answer.instructions == "Be brief."
    count = client.responses.input_tokens.count(model=MODEL, instructions="Be brief.", input=as_items)
    assert count.input_tokens == answer.usage.input_tokens
    again = client.responses.create(input=[USER, *first.output, later], instructions="Be brief.", **SETTINGS)
    assert again.output_text == answer.output_text
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_log_probabilities_are_those_of_a_chat(client):
    chat = client.chat.completions.create(
        model=MODEL, messages=[USER], temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    expected = [entry.model_dump() for entry in chat.choices[0].logprobs.content]
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, **SETTINGS}
    whole = check(client.responses.create(input=[USER], **asked))
    assert [entry.model_dump() for entry in whole.output[0].content[0].logprobs] == expected
    events = list(client.responses.create(input=[USER], stream=True, **asked))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    tokens = [entry.token for event in deltas for entry in event.logprobs]
    assert tokens == [entry["token"] for entry in expected]
    done = next(event for event in events if event.type == "response.output_text.done")
    assert len(done.logprobs) == len(expected)


class Point(BaseModel):
    x: int
    y: bool


def test_a_schema_binds_the_answer_and_is_parsed(client):
    asked = {"model": MODEL, "temperature": 0, "max_output_tokens": 60}
    parsed = client.responses.parse(input="A point.", text_format=Point, **asked)
    assert isinstance(parsed.output_parsed, Point)
    answer = client.responses.create(
        input="Any.", text={"format": {"type": "json_object"}}, **{**asked, "max_output_tokens": 40}
    )
    assert answer.output_text.startswith("{") and answer.text.format.type == "json_object"
    with client.responses.stream(input="A point.", text_format=Point, **asked) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == parsed.output_parsed


def test_what_asks_for_nothing_is_accepted_and_stated(client):
    answer = client.responses.create(
        input="Hi.",
        background=False,
        truncation="disabled",
        service_tier="auto",
        store=True,
        include=["reasoning.encrypted_content", "file_search_call.results"],
        metadata={"trace": "7"},
        user="me",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=False,
        tool_choice="auto",
        tools=[],
        text={"format": {"type": "text"}, "verbosity": "medium"},
        reasoning={"summary": "auto", "effort": "medium"},
        max_tool_calls=3,
        stream_options={"include_obfuscation": False},
        extra_body={
            "previous_response_id": None,
            "conversation": None,
            "prompt": None,
            "seed": 3,
            "top_k": 5,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        },
        **SETTINGS,
    )
    check(answer)
    stated = (answer.metadata, answer.user, answer.prompt_cache_key, answer.parallel_tool_calls, answer.store)
    assert stated == ({"trace": "7"}, "me", "k", False, False)


REFUSED = [
    ("previous_response_id", {"previous_response_id": "resp_1"}, "stores nothing"),
    ("conversation", {"conversation": "conv_1"}, "stores nothing"),
    ("prompt", {"prompt": {"id": "p"}}, "stores nothing"),
    ("background", {"background": True}, "not supported"),
    ("truncation", {"truncation": "auto"}, "not supported"),
    ("service_tier", {"service_tier": "flex"}, "not supported"),
    ("tools", {"tools": [{"type": "web_search"}]}, "'web_search' (at tools.0)"),
    ("tools", {"tools": [WEATHER, {"type": "mcp", "server_label": "x"}]}, "'mcp' (at tools.1)"),
    ("tools", {"tools": [{"type": "function"}]}, "tools.0.name"),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": "some"}, "none, auto, required"),
    ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "mcp", "server_label": "x"}}, "'mcp'"),
    ("include", {"include": ["all"]}, "'all'"),
    ("input", {"input": 7}, "a text, or a list of items"),
    ("input", {"input": []}, "must have an item"),
    ("input", {"input": ["Hi"]}, "input.0"),
    ("input", {"input": [{"type": "item_reference", "id": "msg_1"}]}, "'item_reference' (at input.0)"),
    (
        "input",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]},
        "'input_image' (at input.0.content.0)",
    ),
    ("input", {"input": [USER, {"role": "robot", "content": "Hi"}]}, "input.1.role"),
    ("input", {"input": [{**USER, "weight": 1}]}, "input.0.weight"),
    ("input", {"input": [{"type": "function_call_output", "output": "7"}]}, "input.0.call_id"),
    ("text", {"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs a schema"),
    ("text", {"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ("text", {"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema"),
    ("text", {"text": {"verbosity": "low"}}, "text.verbosity"),
    ("text", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nope"}}}}, ""),
    ("reasoning", {"reasoning": {"budget": 3}}, "reasoning.budget"),
    ("reasoning", {"reasoning": {"effort": "high"}}, "is not read"),
    ("max_output_tokens", {"max_output_tokens": 0}, "greater than or equal to 1"),
    ("top_logprobs", {"top_logprobs": 21}, "less than or equal to 20"),
    ("temperature", {"temperature": -1}, "temperature"),
    ("temperature", {"temperature": "hot"}, "temperature"),
    ("max_tokens", {"max_tokens": 3}, "not supported"),
    ("n", {"n": 2}, "not supported"),
    ("further", {"further": {"n": 2}}, "not supported"),
    ("stream_options", {"stream_options": {"include_obfuscation": True}}, "not supported"),
    ("instructions", {"instructions": ["Be brief."]}, "instructions"),
    ("metadata", {"metadata": {"a": 1}}, "metadata"),
]


@pytest.mark.parametrize(("param", "asked", "said"), REFUSED, ids=lambda one: None)
def test_what_cannot_be_honoured_is_refused_by_name(client, param, asked, said):
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/responses", body={"input": "Hi.", "max_output_tokens": 1, **asked}, cast_to=object)
    assert refused.value.body["param"] == param
    assert said in refused.value.body["message"]


def test_a_prompt_that_is_too_long_is_the_input_s_fault(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="word " * 3000, **SETTINGS)
    assert refused.value.body["param"] == "input"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(input="Hi.", **{**SETTINGS, "model": "another"})


def test_calls_results_and_reasoning_become_a_chat_s_messages():
    items = [
        {"role": "user", "content": "Weather?"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "short"}],
            "content": [{"type": "reasoning_text", "text": "I must look."}],
            "encrypted_content": "opaque",
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": None}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {
            "type": "function_call",
            "call_id": "c2",
            "name": "weather",
            "arguments": '{"city": "Oslo"}',
            "status": "completed",
            "parsed_arguments": None,
        },
        {"type": "function_call_output", "call_id": "c1", "output": "rain", "name": "weather"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "wind"}],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Done."}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "developer", "content": "Be brief."},
    ]
    asked = {"input": items, "tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}
    request = read_request(ResponsesRequest, {**asked, "parallel_tool_calls": False})

    def call(name, arguments):
        return {"id": name, "type": "function", "function": {"name": "weather", "arguments": arguments}}

    texts = [{"type": "text", "text": "sun"}, {"type": "text", "text": "wind"}]
    assert request.messages_of_chat() == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning_content": "I must look.",
            "content": "I look.",
            "tool_calls": [call("c1", "{}"), call("c2", '{"city": "Oslo"}')],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain", "name": "weather"},
        {"role": "tool", "tool_call_id": "c2", "content": texts},
        {"role": "assistant", "reasoning_content": "Done.", "content": "No."},
        {"role": "assistant", "content": "Yes."},
        {"role": "developer", "content": "Be brief."},
    ]
    parameters = request.parameters_of_chat()
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    assert parameters["tools"] == [{"type": "function", "function": function}]
    assert parameters["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert parameters["parallel_tool_calls"] is False


def test_errors_of_a_chat_are_told_in_this_api_s_words():
    for chat_s, own in (("max_tokens", "max_output_tokens"), ("messages", "input"), ("top_p", "top_p")):
        error = RequestError(f"{chat_s} is out of range", code="parameter", tensor=chat_s)
        read_request(ResponsesRequest, {"input": "Hi"}).blame(error)
        assert (error.tensor, str(error)) == (own, f"{own} is out of range.")


def test_a_chat_asks_what_the_response_asks():
    request = read_request(
        ResponsesRequest,
        json.loads('{"input": "Hi", "max_output_tokens": 5, "top_p": 0.5, "seed": 4, "top_logprobs": 3}'),
    )
    chat = request.as_chat()
    assert (chat.answer_length, chat.top_p, chat.seed, chat.alternatives) == (5, 0.5, 4, 3)
