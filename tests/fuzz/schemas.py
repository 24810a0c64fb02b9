"""Grammars that answers must follow: JSON schemas, regular expressions, and grammars in Lark's notation.

One that compiles lets answers through that obey it, as the package jsonschema and Python's `re` see it; tokens are
drawn among those that it allows. One that does not is refused, in bounded time and memory.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pymllm.api import shipped_model
from pymllm.errors import RequestError
from pymllm.text.grammars import Grammar, GrammarCompiler
from pymllm.text.tokenizer import Tokenizer

from ..text.check_schemas import FORMATS
from ..text.random_schemas import NOT_FOLLOWED, hostile, random_schema
from .inputs import NASTY, Input, Raw, changed_json, chosen, dumped

FILE = "grammar.json"
MOST_TOKENS = 120
# What a check in Python may take: its expressions have no end to some texts.
CHECK_SECONDS = 2

KEYWORDS = (
    *(
        '"string"',
        '"integer"',
        '"number"',
        '"object"',
        '"array"',
        '"null"',
        '["string","null"]',
        '{"type":"string"}',
    ),
    *(
        '{"$ref":"#"}',
        '{"$ref":"#/$defs/part"}',
        '{"const":1}',
        '{"enum":[]}',
        '{"enum":["a",1]}',
        '{"anyOf":[]}',
    ),
    *(
        '{"type":"string","pattern":"^a{1,99}$"}',
        '{"minimum":1e308}',
        '{"multipleOf":0}',
        '{"minLength":99999}',
    ),
    *(
        '{"type":"integer","minimum":5,"maximum":4}',
        '{"type":"array","minItems":3,"maxItems":2}',
        '"date"',
        '"x"',
    ),
)
EXPRESSIONS = (
    *("[0-9]{3}-[a-z]{4}", "(yes|no), (cat|dog)\\.", "[α-ω]{2,5}", "a*b+c?", "(ab|cd){1,3}", "\\d+\\.\\d{2}"),
    *("(?i)abc", "[^a-z]{2}", "x{0,3}y", ".{4}", "(a|(b|(c)))", "\\w{1,8}\\s?", "\\x41\\u00e9", "a{3,}"),
)
PIECES = (
    *(
        "a",
        "b",
        ".",
        "*",
        "+",
        "?",
        "{2}",
        "{0,9}",
        "{99999}",
        "{,3}",
        "(",
        ")",
        "[",
        "]",
        "|",
        "^",
        "$",
        "\\",
        "\\b",
    ),
    *(
        "\\d",
        "\\p{L}",
        "[^]",
        "[a-",
        "(?:",
        "(?=a)",
        "(?!a)",
        "(?P<n>a)",
        "(?i)",
        "(?R)",
        "\\1",
        "\x00",
        "é",
        "😀",
        "-",
    ),
    *(
        "\\Z",
        "\\A",
        "&",
        "~",
        "(a*)*",
        "((a{9}){9}){9}",
        "\n",
        "[[:alpha:]]",
        "\\u0041",
        "\\x",
        "(|)",
        "[\\s\\S]",
    ),
)
LARK = (
    'start: NUMBER (("+" | "*") NUMBER){2}\nNUMBER: /[1-9][0-9]?/',
    'start: "a" b\nb: c+\nc: "x" | "y" c',
    'start: %json {"type": "integer", "minimum": 3, "maximum": 9}',
    "start: A & B\nA: /[a-z]{2}/\nB: /.*x/".replace("start: A & B", "start: C\nC: A & B"),
    'start: "<" name ">" start "</" name ">" | ""\nname: /[a-z]{1,3}/',
)
LARK_PIECES = (
    *(
        "start",
        ":",
        "|",
        "\n",
        '"a"',
        '""',
        "/a+/",
        "/(/",
        "&",
        "~",
        "{1,3}",
        "{99999999}",
        "*",
        "+",
        "?",
        "(",
        ")",
    ),
    *(
        "A: ",
        "b",
        "%json {}",
        '%json {"$ref": "#"}',
        "%import common.INT",
        "%ignore /x/",
        "%llguidance {}",
        "<|im_end|>",
    ),
    *(
        "<[1]>",
        "start: start start",
        "#",
        "//",
        "é",
        "\x00",
        "[capture]",
        "-> x",
        "stop=",
        "%regex {}",
        "@a",
        "$",
    ),
)


class Schemas:
    """Compiling a grammar, and drawing answers that follow it."""

    name = "schemas"

    def __init__(self) -> None:
        self.compiler: GrammarCompiler | None = None

    def prepare(self, folder: Path) -> None:
        # Here, once for all children.
        import jsonschema  # noqa: F401
        import llguidance  # noqa: F401

    def inputs(self) -> SearchStrategy[Input]:
        return chosen((6, self._schemas), (3, self._expressions), (3, self._lark), (1, self._hostile))

    def _input(self, kind: str, text: bytes, changed: str) -> Input:
        return Input(kind, {FILE: text}, changed, "breaks")

    def _schemas(self) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            rng = draw(st.randoms(use_true_random=False))
            schema = random_schema(rng, rng.choice((0, 1, 2, 3)))
            if draw(st.sampled_from((True, False, False, False))):
                schema = draw(st.sampled_from(NOT_FOLLOWED))
            way = draw(st.sampled_from(("good", "json", "json", "keyword")))
            if way == "good":
                return self._input("json_schema", dumped(schema), "nothing")
            if way == "json":
                text, changed = draw(changed_json(schema, NASTY + KEYWORDS))
                return self._input("json_schema", text, changed)
            name = draw(st.sampled_from(WORDS))
            value = draw(st.sampled_from(NASTY + KEYWORDS))
            return self._input("json_schema", dumped({**schema, name: Raw(value)}), f"{name}: {value[:40]}")

        return make()

    def _expressions(self) -> SearchStrategy[Input]:
        return self._texts("regex", EXPRESSIONS, PIECES)

    def _lark(self) -> SearchStrategy[Input]:
        return self._texts("lark", LARK, LARK_PIECES)

    def _texts(self, kind: str, good: tuple[str, ...], pieces: tuple[str, ...]) -> SearchStrategy[Input]:
        @st.composite
        def make(draw: Any) -> Input:
            text = draw(st.sampled_from(good))
            for _ in range(draw(st.integers(0, 4))):
                at = draw(st.integers(0, len(text)))
                cut = draw(st.sampled_from((0, 0, 1, 3)))
                text = text[:at] + draw(st.sampled_from(("", *pieces))) + text[at + cut :]
            return self._input(kind, json.dumps(text).encode(), text[:60])

        return make()

    def _hostile(self) -> SearchStrategy[Input]:
        kinds = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark"}
        made = [
            self._input(kinds[kind], json.dumps(value).encode(), name)
            for name, settings in hostile().items()
            for kind, value in settings.items()
        ]
        return st.sampled_from(made)

    def judge(self, given: Input, folder: Path) -> bool:
        text, kind = given.files[FILE].decode("utf-8", "surrogatepass"), given.subject
        if kind == "json_schema":
            grammar = Grammar.of_schema(text)
        else:
            grammar = Grammar("regex" if kind == "regex" else "lark", json.loads(text))
        if self.compiler is None:
            self.compiler = GrammarCompiler(Tokenizer(shipped_model()), 4096, (0,))
            self.tokens = [self.compiler.tokenizer.token_bytes(token) for token in range(4096)]
        for seed in range(2):
            answer = self._draw(grammar, random.Random(seed))
            if answer is not None and not obeys(kind, text, answer):
                return False
        return True

    def _draw(self, grammar: Grammar, rng: random.Random) -> str | None:
        """Draw an answer.  None: it did not come to an end."""
        assert self.compiler is not None
        matcher, drawn = self.compiler.start(grammar), bytearray()
        # What an expression does not match may be no text.
        errors = "replace" if grammar.kind == "lark" else "strict"
        for _ in range(MOST_TOKENS):
            try:
                allowed = torch.nonzero(matcher.allowed()).flatten().tolist()
            except RequestError:
                # It became too complex on the way.
                return None
            assert allowed, "no token may come next"
            ends = [token for token in allowed if token in self.compiler.ends]
            if ends and (rng.random() < 0.3 or len(allowed) == len(ends)):
                return drawn.decode("utf-8", errors)
            token = rng.choice([token for token in allowed if token not in ends])
            matcher.accept(token)
            drawn += self.tokens[token]
            if matcher.complete:
                return drawn.decode("utf-8", errors)
        return None


WORDS = (
    *(
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "enum",
    ),
    *(
        "const",
        "type",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "properties",
        "required",
        "allOf",
        "anyOf",
    ),
    *(
        "oneOf",
        "$ref",
        "$defs",
        "$id",
        "$schema",
        "additionalProperties",
        "patternProperties",
        "not",
        "uniqueItems",
    ),
    *(
        "propertyNames",
        "title",
        "default",
        "x-guidance",
        "nullable",
        "$dynamicRef",
        "contains",
        "if",
        "dependentSchemas",
    ),
)


class _Late(Exception):
    """The end of a check that takes too long."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """End a block of Python after so many seconds of processor time, by raising _Late."""

    def end(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def obeys(kind: str, grammar: str, answer: str) -> bool:
    """Tell whether an answer obeys its grammar, where Python can tell."""
    try:
        with at_most(CHECK_SECONDS):
            if kind == "json_schema":
                return obeys_schema(json.loads(grammar), answer)
            if kind == "regex":
                return obeys_expression(json.loads(grammar), answer)
    except _Late:
        pass
    return True


def obeys_schema(schema: Any, answer: str) -> bool:
    import jsonschema
    import referencing

    value = json.loads(answer)
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        # Nothing that a schema refers to is fetched.
        checked = jsonschema.Draft202012Validator(
            schema, format_checker=FORMATS, registry=referencing.Registry()
        )
        return checked.is_valid(value)
    except _Late:
        raise
    except Exception:
        # No schema that jsonschema knows.
        return True


def obeys_expression(expression: str, answer: str) -> bool:
    # Where Python means the same by it: no classes of Unicode, no anchors within, no flags, nothing possessive.
    plain = re.fullmatch(r"(?:[\w ,.*+?|()\[\]{}-]|\\[dws.x])*", expression, re.ASCII)
    if not plain or re.search(r"\[\[|[*+?}]\+|--|\[[^]]*\[", expression):
        return True
    try:
        return re.fullmatch(expression, answer) is not None
    except re.error:
        return True
