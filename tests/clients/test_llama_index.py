"""llama-index-llms-openai-like: complete, chat, stream, tools, structured output."""

from __future__ import annotations

import pytest
from asked import LONG, QUESTION, Shape, Weather
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

MESSAGES = [ChatMessage(role="user", content=QUESTION)]


@pytest.fixture
def make(server):
    def build(**settings):
        where = {"model": server.model, "api_base": server.url, "api_key": server.key}
        defaults = {
            "is_chat_model": True,
            "is_function_calling_model": True,
            "context_window": 1024,
            "max_tokens": LONG,
        }
        return OpenAILike(**where, **{**defaults, "temperature": 0, "max_retries": 0, **settings})

    return build


@pytest.mark.parametrize("chat", [True, False])
def test_texts_whole_and_streamed_say_the_same(make, chat):
    model = make(max_tokens=24, is_chat_model=chat)
    whole = model.complete("def f(").text
    assert whole and list(model.stream_complete("def f("))[-1].text == whole
    answered = model.chat(MESSAGES).message.content
    assert list(model.stream_chat(MESSAGES))[-1].message.content == answered


def test_tools_are_called(make):
    def get_weather(city: str, days: int) -> str:
        """Return the weather."""
        return "sun"

    tool = FunctionTool.from_defaults(get_weather, fn_schema=Weather)
    model = make()
    answer = model.chat_with_tools([tool], chat_history=MESSAGES, tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather" and Weather.model_validate(call.tool_kwargs)


@pytest.mark.parametrize("settings", [{}, {"should_use_structured_outputs": True}], ids=["tools", "schema"])
def test_answers_are_models(make, settings):
    from llama_index.core.prompts import PromptTemplate

    found = make(**settings).structured_predict(
        Shape, PromptTemplate(QUESTION), llm_kwargs={} if settings else {"tool_choice": "required"}
    )
    assert isinstance(found, Shape)
