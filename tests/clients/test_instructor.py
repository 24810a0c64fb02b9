"""instructor: a model of pydantic as the answer, in each of its ways to ask for one."""

from __future__ import annotations

import instructor
import openai
import pytest
from asked import LONG, QUESTION, Shape, Weather

MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON", "JSON_SCHEMA", "MD_JSON"])
def test_an_answer_is_a_model(server, mode):
    plain = openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    # What is described in words takes much of the shipped model's context.
    model = Shape if mode.startswith("TOOLS") else Weather
    settings = {
        "model": server.model,
        "messages": MESSAGES,
        "max_tokens": LONG,
        "temperature": 0,
        "max_retries": 0,
    }
    if mode in ("JSON", "MD_JSON"):
        # They describe the schema in words, which the shipped model does not understand: here it is held to it.
        schema = {
            "type": "json_schema",
            "json_schema": {"name": "Shape", "schema": model.model_json_schema()},
        }
        settings["extra_body"] = {"response_format": schema}
    assert isinstance(client.chat.completions.create(**settings, response_model=model), model)


def test_an_answer_grows_while_it_streams(server):
    plain = openai.OpenAI(base_url=server.url, api_key=server.key, max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
    parts = list(
        client.chat.completions.create_partial(
            model=server.model, messages=MESSAGES, max_tokens=LONG, response_model=Weather
        )
    )
    assert parts[-1].city in ("Oslo", "Lima") and 1 <= parts[-1].days <= 7
