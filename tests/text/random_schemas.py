"""Random JSON schemas, of bounded texts, and grammars that are made to be slow."""

from __future__ import annotations

import json
import random
import string
from typing import Any

# Texts that match are bounded, so that every answer comes to an end.
PATTERNS = (
    "^[a-z]{1,6}$",
    "^(red|green|blue)-[0-9]{2}$",
    "^[A-Z][a-z]{0,4}( [A-Z][a-z]{0,4})?$",
    r"^\d{3}-\d{4}$",
    "^(?:ab|c){1,4}$",
    "[0-9a-f]{4}$",
    "^é{1,2}[α-ω]?$",
)
# Those that the package jsonschema checks without others.
FORMATS = ("date", "ipv4", "ipv6", "uuid", "time")
WORDS = (
    "",
    "a",
    "b c",
    'say "x"',
    "back\\slash",
    "two\nlines",
    "漢字",
    "\t",
    "</s>",
    "<|im_end|>",
    "0",
    "null",
)
DEPTH = 3


def random_schema(odds: random.Random, depth: int = DEPTH) -> dict[str, Any]:
    """Make a schema: scalars of all types, and objects and arrays of such, `depth` levels deep at most."""
    kinds = [string_schema, integer_schema, number_schema, plain_schema, fixed_schema]
    if depth:
        kinds += [object_schema, object_schema, object_schema, array_schema, array_schema, choice_schema]
    if depth == DEPTH:
        kinds = [object_schema, object_schema, array_schema, choice_schema, reference_schema]
    return odds.choice(kinds)(odds, depth)


def string_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    kind = odds.randrange(3)
    if kind == 0:
        least = odds.randint(0, 5)
        return {"type": "string", "minLength": least, "maxLength": least + odds.randint(0, 6)}
    if kind == 1:
        return {
            "type": "string",
            "pattern": odds.choice(PATTERNS[:5]) if odds.random() < 0.8 else PATTERNS[6],
        }
    return {"type": "string", "format": odds.choice(FORMATS[:4])}


def integer_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    low = odds.choice((-1000, -7, 0, 0, 1, 3, 990))
    schema: dict[str, Any] = {"type": "integer"}
    schema[odds.choice(("minimum", "exclusiveMinimum"))] = low
    schema[odds.choice(("maximum", "exclusiveMaximum"))] = low + odds.choice((4, 30, 5000))
    if odds.random() < 0.3:
        schema["multipleOf"] = odds.choice((2, 3))
    return schema


def number_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    low = odds.choice((-2.5, 0, 0.25, 10))
    return {"type": "number", "minimum": low, "maximum": low + odds.choice((1, 7.5)), "multipleOf": 0.25}


def plain_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    return {"type": odds.choice(("boolean", "null", ["boolean", "null"]))}


def fixed_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    values: list[Any] = [*WORDS, 1, -3, 2.5, True, False, None, [1, "x"], {"k": [None]}]
    if odds.random() < 0.3:
        return {"const": odds.choice(values)}
    return {"enum": odds.sample(values, odds.randint(1, 6))}


def object_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    names = odds.sample([*string.ascii_lowercase[:8], "a long name", 'q"uote', "é", ""], odds.randint(0, 4))
    properties = {name: random_schema(odds, depth - 1) for name in names}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if names and odds.random() < 0.8:
        schema["required"] = odds.sample(names, odds.randint(1, len(names)))
    return schema


def array_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    least = odds.randint(0, 2)
    schema: dict[str, Any] = {
        "type": "array",
        "items": random_schema(odds, depth - 1),
        "minItems": least,
        "maxItems": least + odds.randint(0, 2),
    }
    if odds.random() < 0.3:
        schema["prefixItems"] = [random_schema(odds, 0) for _ in range(odds.randint(1, 2))]
        schema["maxItems"] = max(schema["maxItems"], len(schema["prefixItems"]))
    return schema


def choice_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(odds, depth - 1) for _ in range(odds.randint(1, 3))]}


def reference_schema(odds: random.Random, depth: int) -> dict[str, Any]:
    """A schema of which a part is named, and comes again."""
    part = {"$ref": "#/$defs/part"}
    return {
        "$defs": {"part": random_schema(odds, 1)},
        "type": "object",
        "properties": {"one": part, "two": {"type": "array", "items": part, "maxItems": 2}, "three": part},
        "required": ["one", odds.choice(("two", "three"))],
        "additionalProperties": False,
    }


def hostile() -> dict[str, dict[str, Any]]:
    """Make grammars that take long, take much, or have no end, by what makes them so; as settings of requests."""
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(400):
        deep = {"type": "array", "items": deep, "minItems": 1}
    nested = '{"type":"array","items":' * 5000 + "{}" + "}" * 5000
    doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a" | ""'
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}}
    wide = {f"key{i}": {"$ref": "#"} for i in range(500)}
    return {
        "the n-th letter from the end": {"regex": "(a|b)*a(a|b){24}c"},
        "nested repetitions": {"regex": "((a{0,99}){0,99}){0,99}b"},
        "alternatives that begin alike": {"regex": "(" + "|".join("a" * i + "b" for i in range(300)) + ")*c"},
        "an intersection": {"grammar": "start: A\nA: /(a|b)*a(a|b){14}/ & /(a|b)*b(a|b){15}/ & /.{9,}/"},
        "a complement": {"grammar": "start: A\nA: ~/(.|\\n)*a(a|b){18}(.|\\n)*/"},
        "a deep schema": {"json_schema": deep},
        "a deep text": {"json_schema": nested},
        "a schema that begins with itself": {"json_schema": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}},
        "a tree without an end": {"json_schema": {**tree, "required": ["kids"]}},
        "a schema that has itself many times": {"json_schema": {"type": "object", "properties": wide}},
        "a huge enumeration": {"json_schema": {"enum": [f"value {i:04x}" for i in range(3500)]}},
        "a schema of a megabyte": {"json_schema": {"enum": ["x" * 1000 + str(i) for i in range(1000)]}},
        "an expression of a megabyte": {"regex": "ab" * (1 << 19)},
        "rules that double": {"grammar": f"start: r0\n{doubling}"},
        "rules that begin with themselves": {"grammar": 'start: start start | "a" | ""'},
        "long strings that must differ": {
            "json_schema": {
                "type": "array",
                "items": {"type": "string", "maxLength": 60_000},
                "minItems": 999,
            }
        },
        "all of many": {
            "json_schema": {"allOf": [{"type": "string", "pattern": f"a.{{{i},}}b"} for i in range(1, 40)]}
        },
        "one of many": {
            "json_schema": {"oneOf": [{"type": "integer", "minimum": i, "maximum": i + 9} for i in range(60)]}
        },
    }


# What llguidance does not follow, and a schema that would be another one without it.
NOT_FOLLOWED: tuple[dict[str, Any], ...] = (
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}},
    {"type": "object", "properties": {"a": {}}, "minProperties": 1},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 3}},
    {"type": "object", "unevaluatedProperties": False},
    {"type": "string", "format": "no-such-format"},
    {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
)


def size(schema: Any) -> int:
    """Return the number of characters of a schema."""
    return len(json.dumps(schema))
