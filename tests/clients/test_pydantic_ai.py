"""pydantic-ai: agents over chat completions, with text, tools and models as their output."""

from __future__ import annotations

import asyncio

import pytest
from asked import LONG, QUESTION, Shape
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS = {"max_tokens": LONG, "temperature": 0.0}


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def model(request, server):
    return request.param(server.model, provider=OpenAIProvider(base_url=server.url, api_key=server.key))


def test_an_agent_answers_and_streams(model):
    agent = Agent(model, model_settings={**SETTINGS, "max_tokens": 24})
    whole = agent.run_sync(QUESTION).output

    async def streamed():
        async with agent.run_stream(QUESTION) as run:
            return [text async for text in run.stream_text(delta=True, debounce_by=None)]

    assert whole and "".join(asyncio.run(streamed())) == whole


@pytest.mark.parametrize("way", [ToolOutput, NativeOutput])
def test_an_agents_output_is_a_model(model, way):
    """ToolOutput: a call of one tool, which is forced (tool_choice: required); NativeOutput: response_format."""
    answer = Agent(model, output_type=way(Shape), model_settings=SETTINGS).run_sync(QUESTION)
    assert isinstance(answer.output, Shape)
    again = Agent(model, model_settings={**SETTINGS, "max_tokens": 8})
    assert again.run_sync("More.", message_history=answer.all_messages()).output
