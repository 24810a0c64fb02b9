"""[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...], and the later [TOOL_CALLS]name[ARGS]{...}: Mistral."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

from pymllm.text.parts import PartReader
from pymllm.text.tool_calls.base import Steps, Tool, ToolFamily, json_rule, literal, object_rules, repeated
from pymllm.text.tool_calls.granite import ArrayText

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ALPHANUMERIC = string.ascii_letters + string.digits
ID = re.compile(r"[A-Za-z0-9]{9}")
WORD = re.compile(r"[A-Za-z0-9_.-]*")


class Mistral(ToolFamily):
    """Calls after a marker.  named: the later form, in which each has a marker, its name and its arguments."""

    name = "mistral"
    markers = (OPEN, CALL_ID, ARGS)

    def __init__(self, named: bool) -> None:
        self.named = named

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return MistralText(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        if not self.named:
            yield (
                f"calls: {spell(OPEN)} " + literal("[") + " " + repeated("call", literal(", "), most) + ' "]"'
            )
            yield from object_rules(tools, "arguments")
            return
        yield "calls: " + repeated("call", "", most)
        yield "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
        for index, tool in enumerate(tools):
            yield f"call_{index}: {spell(OPEN)} {literal(tool.name)} {spell(ARGS)} args_{index}"
            yield json_rule(f"args_{index}", tool.schema)

    def new_id(self) -> str:
        return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))

    def history_id(self, given: str) -> str:
        # The templates raise for any other id.
        return given if ID.fullmatch(given) else hashlib.sha256(given.encode()).hexdigest()[:9]


class MistralText(ArrayText):
    """The text of an answer in this family, in either form."""

    def after_marker(self) -> Steps:
        if self.buffer.startswith("[", self.at):
            return (yield from self.array_of_calls())
        name = yield from self._word()
        if not name:
            return False
        if (yield from self.take(CALL_ID)):
            yield from self._word()
        yield from self.take(ARGS)
        return (yield from self.skip_space()) and (yield from self.arguments(name))

    def _word(self) -> Generator[None, None, str]:
        """Read letters, digits, _, - and . up to what else follows."""
        while (end := WORD.match(self.buffer, self.at).end()) == len(self.buffer) and not self.final:  # type: ignore[union-attr]
            yield
        word, self.at = self.buffer[self.at : end], end
        return word
