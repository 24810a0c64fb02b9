"""Random JSON schemas, whose answers the package jsonschema checks, and grammars that would hold everybody up."""

from __future__ import annotations

import json
import random

import pytest

from pymllm import LLM, SamplingParams
from pymllm.errors import RequestError
from pymllm.text.grammars import MAX_INTERSECTED, Grammar, intersected

from .random_schemas import NOT_FOLLOWED, hostile, random_schema

pytest.importorskip("llguidance")

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def llm():
    return LLM(dtype="float32", compute="exact", progress=False)


def test_answers_to_random_schemas_are_valid(llm):
    pytest.importorskip("jsonschema")
    from .check_schemas import answer_schemas

    found = answer_schemas(llm, 40)
    assert len(found) == 40 and sum(tokens for _, tokens in found) > 1000


def test_the_check_of_answers_finds_what_is_wrong():
    jsonschema = pytest.importorskip("jsonschema")
    from .check_schemas import check

    check({"type": "string", "format": "date"}, '"0000-02-29"')
    for schema, text in (
        ({"type": "string", "format": "date"}, '"2001-02-29"'),
        ({"type": "integer", "multipleOf": 3}, "7"),
        ({"type": "array", "maxItems": 1}, "[1, 2]"),
        ({"required": ["a"]}, "{}"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            check(schema, text)


@pytest.mark.parametrize("schema", NOT_FOLLOWED, ids=json.dumps)
def test_what_would_be_left_out_of_a_schema_is_refused(llm, schema):
    with pytest.raises(RequestError, match="cannot be compiled"):
        llm.grammars.start(SamplingParams(json_schema=schema).follows)


def test_hostile_grammars_hold_nobody_up(llm):
    """Each is followed as far as it goes, or has an error of its own; others beside it answer as ever.

    What they may take is counted in llguidance's own fuel: without these bounds some never end.
    """
    plain = SamplingParams(max_tokens=24)
    sampled = SamplingParams(max_tokens=24, temperature=1.0, seed=4)
    alone = [llm.generate(PROMPT, params)[0].token_ids for params in (plain, sampled)]
    ended = {}
    with llm.session() as session:
        beside = [session.add(llm.encode(PROMPT), params, req_id=0) for params in (plain, sampled)]
        for name, settings in hostile().items():
            try:
                params = SamplingParams(max_tokens=6, temperature=1.0, seed=0, **settings)
                ended[name] = session.add(llm.encode(PROMPT), params)
            except RequestError as error:
                ended[name] = error
        while session.unfinished:
            session.step()
    assert [tuple(request.answer) for request in beside] == alone
    refused = {name for name, end in ended.items() if isinstance(end, RequestError)}
    assert refused >= {
        *("a deep schema", "a deep text", "a schema that begins with itself", "all of many", "one of many"),
        *("a schema of a megabyte", "an expression of a megabyte"),
    }
    for name in ended.keys() - refused:
        error = ended[name].error
        assert error is None or (isinstance(error, RequestError) and error.code == "grammar"), name
    assert len(refused) < len(ended) - 5
    assert llm.engine.idle


def pattern(number):
    return {"type": "string", "pattern": f"a.{{{number},}}b"}


MANY = [pattern(number) for number in range(MAX_INTERSECTED + 1)]
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", **pattern(i)} for i in range(MAX_INTERSECTED + 1)}


@pytest.mark.parametrize(
    ("schema", "count"),
    [
        ({}, 0),
        (pattern(1), 1),
        ({"anyOf": MANY}, 1),
        ({"properties": {str(i): part for i, part in enumerate(MANY)}}, 1),
        ({"prefixItems": MANY, "items": {"format": "date"}}, 1),
        ({"allOf": MANY}, len(MANY)),
        ({"allOf": [{"properties": {"a": part}} for part in MANY]}, len(MANY)),
        ({"allOf": [{"allOf": MANY[:3]}, {"anyOf": MANY[:5]}]}, 4),
        ({"items": {"items": {"allOf": MANY[:3]}}}, 3),
        ({"$ref": "#/$defs/d0", "$defs": {**CHAIN, f"d{len(CHAIN)}": {}}}, len(CHAIN) * 2),
        ({"$defs": {"a/b~": [pattern(1), pattern(2)]}, "$ref": "#/$defs/a~1b~0/1", "pattern": "x"}, 3),
        ({"properties": {"again": {"$ref": "#"}, "name": pattern(0)}}, 1),
        ({"$defs": {"x": {"$anchor": "there", "allOf": MANY[:2]}}, "$ref": "#there"}, 4),
        ({"enum": ["pattern"], "properties": {"pattern": {"type": "string"}}}, 0),
    ],
    ids=str,
)
def test_expressions_that_hold_together_are_counted(schema, count):
    assert intersected(schema) == count


@pytest.mark.parametrize(
    "grammar",
    [
        "start: A\nA: " + " & ".join(f"/.*a.{{{i},}}b.*/" for i in range(MAX_INTERSECTED + 2)),
        "start: %json " + json.dumps({"allOf": MANY}),
        "start: A B\nB: %json" + json.dumps({"allOf": MANY}) + "\nA: /&/",
    ],
)
def test_too_many_expressions_for_the_same_text_are_refused(grammar):
    with pytest.raises(RequestError, match="hold for the same text") as caught:
        Grammar("lark", grammar)
    assert caught.value.tensor == "grammar"


def test_few_and_those_in_texts_are_not():
    Grammar("lark", "start: A\nA: " + " & ".join(["/a+/"] * (MAX_INTERSECTED + 1)))
    Grammar("lark", 'start: "' + "&" * 50 + '" /&{3}\\/&&&&&&&&&&&&&/')
    assert max(intersected(random_schema(random.Random(seed))) for seed in range(300)) == 1
