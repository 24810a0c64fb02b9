"""<|tool_call|>[{"name": ..., "arguments": {...}}, ...]: Granite 3; and with one object and an end mark, Phi-4-mini."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from pymllm.text.parts import PartReader
from pymllm.text.tool_calls.base import Steps, Tool, ToolFamily, object_rules, repeated
from pymllm.text.tool_calls.json_object import ObjectCalls

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"


class Granite(ToolFamily):
    """Calls in one array after a marker."""

    name = "granite"
    markers = (OPEN, CLOSE)

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return GraniteText(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        yield f'calls: {spell(OPEN)} "[" {repeated("call", chr(34) + ", " + chr(34), most)} "]"'
        yield from object_rules(tools, "arguments")

    def in_words(self, calls: Sequence[str]) -> str:
        return f"{OPEN}[{', '.join(calls)}]"


class ArrayText(ObjectCalls):
    """The text of an answer whose calls are an array after the first of the family's markers."""

    def steps(self) -> Steps:
        opening = self.family.markers[0]
        while (yield from self.say_until(opening)):
            start = self.at
            self.at += len(opening)
            if not (yield from self.skip_space()) or not (yield from self.after_marker()):
                self.at = start
                self.say(start + len(opening))
        return True

    def after_marker(self) -> Steps:
        """Read the calls that a marker begins.  Returns whether there are any."""
        return (yield from self.array_of_calls())


class GraniteText(ArrayText):
    """The text of an answer in this family."""

    def after_marker(self) -> Steps:
        array = self.buffer.startswith("[", self.at)
        read = yield from (self.array_of_calls() if array else self.object_call())
        if read:
            yield from self.take_after_space(CLOSE)
        return read
