"""openai-agents and smolagents: agents over chat completions and responses."""

from __future__ import annotations

import asyncio

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
)
from asked import LONG, QUESTION, Shape
from smolagents import OpenAIServerModel, Tool


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def agent(request, server):
    def build(**settings):
        client = openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0)
        model = request.param(model=server.model, openai_client=client)
        more = settings.pop("settings", {})
        chosen = ModelSettings(temperature=0, max_tokens=LONG, **more)
        return Agent(name="ours", instructions="Be brief.", model=model, model_settings=chosen, **settings)

    return build


def run(agent):
    return asyncio.run(Runner.run(agent, QUESTION, run_config=RunConfig(tracing_disabled=True))).final_output


def test_agents_answer_with_text_and_models(agent):
    assert isinstance(run(agent()), str)
    assert isinstance(run(agent(output_type=Shape)), Shape)


def test_agents_call_tools(agent):
    seen = []

    @function_tool
    def count(number: int) -> str:
        """Count to a number."""
        seen.append(number)
        return "done"

    built = agent(
        tools=[count],
        settings={"tool_choice": "required", "parallel_tool_calls": False},
        tool_use_behavior="stop_on_first_tool",
    )
    assert run(built) == "done" and len(seen) == 1


class Weather(Tool):
    name = "get_weather"
    description = "Return the weather of a city."
    inputs = {"days": {"type": "integer", "description": "for how many days"}}
    output_type = "string"

    def forward(self, days: int) -> str:
        return "sun"


def test_smolagents_models_answer_and_call(server):
    model = OpenAIServerModel(
        server.model, api_base=server.url, api_key=server.key, max_tokens=100, temperature=0
    )
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    whole = model.generate(messages)
    assert (
        whole.content and "".join(d.content or "" for d in model.generate_stream(messages)) == whole.content
    )
    called = model.generate(messages, tools_to_call_from=[Weather()])
    assert called.tool_calls[0].function.name == "get_weather"
