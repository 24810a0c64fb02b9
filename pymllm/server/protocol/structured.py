"""`structured_outputs`, vLLM's name for the form of an answer; `guided_*` are its earlier ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pymllm.server.protocol.base import StrictModel, refuse

UNSUPPORTED = (
    *("disable_any_whitespace", "disable_additional_properties"),
    *("whitespace_pattern", "structural_tag"),
)


class StructuredOutputs(StrictModel):
    """The form of an answer.  One of json, regex, choice, grammar and json_object.

    disable_*, whitespace_pattern: settings of other servers' compilers, at the values that ask for nothing.
    """

    json_: dict[str, Any] | str | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar_: str | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    model_config = StrictModel.model_config | {"alias_generator": lambda name: name.rstrip("_")}

    def grammars(self) -> list[dict[str, Any]]:
        """Return the keywords of SamplingParams that say so, one for each form that is named."""
        for name in UNSUPPORTED:
            if getattr(self, name) not in (None, False):
                problem = f"has {name}, which is not supported by this server"
                refuse("structured_outputs", problem, code="unsupported_parameter")
        named = {
            "json_schema": {"type": "object"} if self.json_object and self.json_ is None else self.json_,
            "grammar": self.grammar_,
        }
        found = [{name: value} for name, value in named.items() if value is not None]
        regexes = [self.regex, None if self.choice is None else choices("structured_outputs", self.choice)]
        return found + [{"regex": regex} for regex in regexes if regex is not None]


def choices(param: str, texts: Sequence[str]) -> str:
    """Write the regular expression of texts, one of which an answer is."""
    if not texts:
        refuse(param, "must name a choice")
    return "|".join(f"({re.escape(text)})" for text in texts)
