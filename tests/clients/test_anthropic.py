"""anthropic: /v1/messages whole and streamed, tools, tokens counted."""

from __future__ import annotations

import anthropic
import pytest
from asked import QUESTION, Weather

MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": Weather.model_json_schema()}


@pytest.fixture
def client(server):
    return anthropic.Anthropic(base_url=server.root, api_key=server.key, max_retries=0)


def ask(client, server, **settings):
    settings = {"model": server.model, "messages": MESSAGES, "max_tokens": 24, **settings}
    return client.messages.create(**settings, extra_body={"temperature": 0})


def test_messages_whole_and_streamed_say_the_same(client, server):
    whole = ask(client, server, system="Be brief.")
    assert whole.type == "message" and whole.role == "assistant"
    assert whole.content[0].type == "text" and whole.content[0].text
    assert whole.stop_reason in ("end_turn", "max_tokens") and whole.usage.output_tokens <= 24
    settings = {"model": server.model, "messages": MESSAGES, "max_tokens": 24, "system": "Be brief."}
    with client.messages.stream(**settings, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"]
)
def test_tools_are_called_and_their_results_go_back(client, server, choice):
    # Else a model of this size calls again and again, as far as its tokens go.
    choice = {**choice, "disable_parallel_tool_use": True}
    answer = ask(client, server, tools=[TOOL], tool_choice=choice, max_tokens=100)
    (call,) = (block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and call.name == "get_weather"
    assert Weather.model_validate(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    again = ask(client, server, messages=history, tools=[TOOL], tool_choice={"type": "none"})
    assert again.content and again.stop_reason in ("end_turn", "max_tokens")
    settings = {"model": server.model, "messages": MESSAGES, "max_tokens": 100, "tools": [TOOL]}
    with client.messages.stream(**settings, tool_choice=choice) as stream:
        (streamed,) = (block for block in stream.get_final_message().content if block.type == "tool_use")
    assert Weather.model_validate(streamed.input)


def test_tokens_are_counted(client, server):
    counted = client.messages.count_tokens(model=server.model, messages=MESSAGES)
    usage = ask(client, server).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_clients_own_classes(client, server):
    with pytest.raises(anthropic.NotFoundError):
        ask(client, server, model="claude")
    with pytest.raises(anthropic.AuthenticationError):
        ask(client.with_options(api_key="other"), server)
    with pytest.raises(anthropic.BadRequestError):
        ask(client, server, max_tokens=0)
