"""litellm: completion, stream, tools, structured output, embeddings, text completion; its own error classes."""

from __future__ import annotations

import asyncio

import litellm
import pytest
from asked import LONG, QUESTION, WEATHER, Shape, Weather

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def ask(server):
    # openai/: any server with OpenAI's API; hosted_vllm/: one that has vLLM's fields too.
    def call(provider="openai", function=litellm.completion, **settings):
        settings = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24, **settings}
        return function(
            model=f"{provider}/{server.model}", api_base=server.url, api_key=server.key, **settings
        )

    return call


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chats_whole_streamed_and_asynchronous_say_the_same(ask, provider):
    whole = ask(provider).choices[0].message.content
    assert whole
    streamed = ask(provider, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole
    assert asyncio.run(ask(provider, litellm.acompletion)).choices[0].message.content == whole


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_tools_are_called(ask, choice):
    answer = ask(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=LONG)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and Weather.model_validate_json(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_answers_follow_a_model(ask, provider):
    answer = ask(provider, response_format=Shape, max_tokens=LONG)
    assert Shape.model_validate_json(answer.choices[0].message.content)


def test_text_completions_and_embeddings(ask, server):
    answer = litellm.text_completion(
        model=f"text-completion-openai/{server.model}",
        prompt="def f(",
        api_base=server.url,
        api_key=server.key,
        max_tokens=4,
    )
    assert answer.choices[0].text
    vectors = litellm.embedding(
        model=f"openai/{server.model}", input=["a", "b"], api_base=server.url, api_key=server.key
    )
    assert len(vectors.data) == 2


def test_errors_are_the_clients_own_classes(ask, server):
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(
            model=f"openai/{server.model}", messages=MESSAGES, api_base=server.url, api_key="x"
        )
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/other", messages=MESSAGES, api_base=server.url, api_key=server.key)
