"""langchain-openai: ChatOpenAI whole, streamed, with tools and structured output; OpenAIEmbeddings."""

from __future__ import annotations

import pytest
from asked import LONG, QUESTION, Shape, Weather
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings


@pytest.fixture
def model(server):
    return ChatOpenAI(
        model=server.model,
        base_url=server.url,
        api_key=server.key,
        temperature=0,
        max_tokens=LONG,
        max_retries=0,
    )


def test_chats_whole_and_streamed_say_the_same(model):
    short = model.bind(max_tokens=24)
    whole = short.invoke(QUESTION)
    assert whole.content and whole.usage_metadata["output_tokens"] <= 24
    assert "".join(part.content for part in short.stream(QUESTION)) == whole.content


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_are_models(model, method):
    assert isinstance(model.with_structured_output(Shape, method=method).invoke(QUESTION), Shape)


@pytest.mark.parametrize("choice", ["required", "Weather"])
def test_tools_are_called_and_their_results_go_back(model, choice):
    tooled = model.bind_tools([Weather], tool_choice=choice, parallel_tool_calls=False)
    answer = tooled.invoke(QUESTION)
    (call,) = answer.tool_calls
    assert call["name"] == "Weather" and Weather.model_validate(call["args"])
    parts = list(tooled.stream(QUESTION))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert whole.tool_calls[0]["name"] == "Weather" and Weather.model_validate(whole.tool_calls[0]["args"])
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sun"}
    again = model.bind(max_tokens=8).invoke([("user", QUESTION), answer, result])
    assert again.usage_metadata["output_tokens"] <= 8


def test_completions_and_embeddings(server):
    where = {"model": server.model, "base_url": server.url, "api_key": server.key}
    assert OpenAI(**where, max_tokens=4, temperature=0).invoke("def f(")
    # Without check_embedding_ctx_length=False it sends the token ids of another model's tokenizer.
    vectors = OpenAIEmbeddings(**where, check_embedding_ctx_length=False).embed_documents(["a", "b"])
    assert len(vectors) == 2 and len(vectors[0]) == 256
