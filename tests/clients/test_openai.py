"""openai: chats, streams, parsing, tools, completions, embeddings, responses; errors as its classes."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from asked import LONG, QUESTION, WEATHER, Shape, Weather

MESSAGES = [{"role": "user", "content": QUESTION}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)


def chat(client, server, **settings):
    settings = {"model": server.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 24, **settings}
    return client.chat.completions.create(**settings)


def test_chats_whole_streamed_and_asynchronous_say_the_same(client, server):
    whole = chat(client, server).choices[0].message.content
    streamed = chat(client, server, stream=True, stream_options={"include_usage": True})
    parts = list(streamed)
    assert whole and "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    assert parts[-1].usage.total_tokens > 24

    async def ask():
        async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key) as other:
            answer, stream = await asyncio.gather(chat(other, server), chat(other, server, stream=True))
            pieces = [part.choices[0].delta.content or "" async for part in stream]
            return answer.choices[0].message.content, "".join(pieces)

    assert asyncio.run(ask()) == (whole, whole)


def test_the_helper_of_streams_ends_in_the_whole_answer(client, server):
    # It takes an answer that is cut off for one that cannot be parsed: this one ends with its line.
    settings = {
        "model": server.model,
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 200,
        "stop": "\n",
    }
    whole = client.chat.completions.create(**settings)
    with client.chat.completions.stream(**settings) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_answers_are_parsed_into_models(client, server):
    settings = {"model": server.model, "messages": MESSAGES, "max_tokens": LONG}
    answer = client.chat.completions.parse(**settings, response_format=Shape)
    assert isinstance(answer.choices[0].message.parsed, Shape)
    with client.chat.completions.stream(**settings, response_format=Shape) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Shape)
    loose = chat(client, server, response_format={"type": "json_object"}, max_tokens=LONG, stop=["}"])
    assert loose.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(client, server, choice, stream):
    settings = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 100, "parallel_tool_calls": False}
    if stream:
        name = arguments = ""
        for part in chat(client, server, stream=True, **settings):
            for call in (part.choices[0].delta.tool_calls or ()) if part.choices else ():
                assert call.index == 0
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    else:
        answer = chat(client, server, **settings).choices[0]
        (call,) = answer.message.tool_calls
        assert call.id and call.type == "function"
        name, arguments = call.function.name, call.function.arguments
    assert name == "get_weather" and Weather.model_validate_json(arguments)


def test_a_tool_is_parsed_and_its_result_goes_back(client, server):
    tool = openai.pydantic_function_tool(Weather)
    settings = {"model": server.model, "messages": MESSAGES, "max_tokens": LONG, "parallel_tool_calls": False}
    answer = client.chat.completions.parse(**settings, tools=[tool], tool_choice="required")
    message = answer.choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": json.dumps({"sun": True})}
    # The SDK's object goes back as it is.
    again = chat(client, server, messages=[*MESSAGES, message, result], tools=[tool], tool_choice="none")
    assert again.choices[0].message.tool_calls in (None, [])
    assert again.usage.prompt_tokens > 0 and again.choices[0].message.content is not None


def test_completions_with_echo_and_several_answers(client, server):
    answer = client.completions.create(
        model=server.model, prompt="def f(", max_tokens=4, echo=True, logprobs=1, n=2, best_of=2, suffix=""
    )
    assert len(answer.choices) == 2
    assert all(choice.text.startswith("def f(") for choice in answer.choices)
    assert answer.choices[0].logprobs.token_logprobs[0] is None


def test_embeddings_as_numbers_and_as_the_client_asks(client, server):
    texts = ["import os", "def f(x):"]
    packed = client.embeddings.create(
        model=server.model, input=texts
    ).data  # base64, which the client unpacks
    plain = client.embeddings.create(model=server.model, input=texts, encoding_format="float").data
    assert [one.embedding for one in packed] == [pytest.approx(one.embedding, abs=1e-6) for one in plain]


def test_what_asks_for_nothing_is_accepted(client, server):
    answer = chat(
        client,
        server,
        metadata={"task": "a"},
        store=False,
        service_tier="auto",
        safety_identifier="someone",
        prompt_cache_key="a",
        prediction={"type": "content", "content": "def"},
        verbosity="medium",
        reasoning_effort="medium",
        modalities=["text"],
        logit_bias={},
        n=1,
        user="me",
    )
    assert answer.choices[0].message.content == chat(client, server).choices[0].message.content


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, server, messages=[{"role": "user", "content": "word " * 3000}])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, server, model="gpt-5")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as wrong:
        chat(client.with_options(api_key="other"), server)
    assert wrong.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as unknown:
        chat(client, server, extra_body={"colour": "red"})
    assert (unknown.value.code, unknown.value.param) == ("unsupported_parameter", "colour")


@pytest.fixture
def respond(client, server):
    def ask(**settings):
        settings = {
            "model": server.model,
            "input": QUESTION,
            "temperature": 0,
            "max_output_tokens": 24,
            **settings,
        }
        return client.responses.create(**settings)

    return ask


def test_responses_whole_and_streamed(client, respond):
    whole = respond()
    assert whole.output_text and whole.usage.output_tokens <= 24
    events = list(respond(stream=True))
    assert events[0].type == "response.created" and events[-1].type in (
        "response.completed",
        "response.incomplete",
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text


def test_responses_call_tools_and_are_parsed(client, server, respond):
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    answer = respond(tools=[tool], tool_choice="required", parallel_tool_calls=False, max_output_tokens=LONG)
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert call.name == "get_weather" and Weather.model_validate_json(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    again = respond(input=[{"role": "user", "content": QUESTION}, *answer.output, result])
    assert again.usage.input_tokens > respond().usage.input_tokens
    parsed = client.responses.parse(
        model=server.model, input=QUESTION, text_format=Shape, max_output_tokens=LONG
    )
    assert isinstance(parsed.output_parsed, Shape)
