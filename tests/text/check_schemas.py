"""Answers to random JSON schemas, held against the package jsonschema."""

from __future__ import annotations

import json
import random

import jsonschema

from pymllm import LLM, SamplingParams

from .random_schemas import random_schema

PROMPTS = ("def read_lines(path):\n", "import os\n", "{", "x")
MAX_TOKENS = 1000  # more than the longest text of these schemas has on small models

FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date")
def is_date(value: object) -> bool:
    """RFC 3339 has a year 0, which Python's dates have not; it is a leap year, as 2000 is."""
    text = str(value)
    return jsonschema.FormatChecker().conforms(
        "2000" + text[4:] if text.startswith("0000-") else text, "date"
    )


def check(schema: object, text: str) -> None:
    """Raise what json and jsonschema raise unless the text is JSON and valid."""
    jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(text))


def answer_schemas(llm: LLM, count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Answer `count` schemas side by side, greedily and sampled, and check every answer.

    Returns of each whether it was sampled, and its tokens.
    """
    odds = random.Random(seed)
    schemas = [random_schema(odds) for _ in range(count)]
    sampled = {"temperature": 1.2, "top_p": 0.95}
    params = [
        SamplingParams(
            max_tokens=MAX_TOKENS, json_schema=schema, **({**sampled, "seed": index} if index % 2 else {})
        )
        for index, schema in enumerate(schemas)
    ]
    outputs = llm.generate([PROMPTS[index % len(PROMPTS)] for index in range(count)], params)
    for schema, output in zip(schemas, outputs, strict=True):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert output.finish_reason == "stop", (schema, output.text)
        check(schema, output.text)
    return [("sampled" if index % 2 else "greedy", len(o.token_ids)) for index, o in enumerate(outputs)]
