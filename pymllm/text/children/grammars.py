"""A grammar, compiled once where it can do no harm: one that crashes its compiler ends this process and no other.

Runs in a process of its own (program.py). What compiles here is compiled once more, by the same steps, for its use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What llguidance may spend: on the tokens after one token (50,000 take some milliseconds where states are simple, and a
# second where each is a huge expression), and on the states of one answer.
LIMITS: dict[str, Any] = {"step_lexer_fuel": 50_000, "max_lexer_states": 50_000}
# Else text that only one way goes on from is encoded, and the spelling of a special token becomes that token.
NO_FORCING = '%llguidance {"no_forcing": true}'
# Between the tokens of JSON: a space, or a new line and an indent. Small models else write spaces without an end.
SPACE = r"( |\n[ \t]{0,32})?"


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile a grammar of a `kind` from its `text`, for tokens that are bytes, and say whether these refuse it."""
    import llguidance

    try:
        automaton = compile_grammar(request["kind"], request["text"], llguidance.LLTokenizer("byte"))
    except MemoryError:
        raise
    except BaseException as error:  # a panic is no Exception
        return {"invalid": str(error)}
    return {"invalid": automaton.get_error()} if automaton.is_error() else {"read": True}


def compile_grammar(kind: str, text: str, tokens: Any) -> Any:
    """Compile a grammar to an automaton over tokens, which may be in error.

    kind: json_schema, regex or lark.  Raises what llguidance raises, ValueError and panics of its own.
    """
    import llguidance

    matcher = llguidance.LLMatcher
    if kind == "json_schema":
        made = _only(matcher.grammar_from_json_schema(text, {"whitespace_pattern": SPACE}))
        lark = f"start: %json {json.dumps(made['json_schema'])}"
    elif kind == "regex":
        lark = _only(matcher.grammar_from_regex(text))["lark_grammar"]
    else:
        lark = text
    text = matcher.grammar_from_lark(f"{lark}\n{NO_FORCING}")
    automaton = matcher(tokens, text, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    if not automaton.is_error():
        automaton.compute_bitmask()  # here, as it may take longer than later ones
    return automaton


def _only(text: str) -> Any:
    (made,) = json.loads(text)["grammars"]
    return made
