"""{"name": ..., "arguments": {...}} and nothing else: for templates that do not know tools.

The model is told of its tools, and how to call them, by a system message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence

from pymllm.text.parts import PartReader
from pymllm.text.tool_calls.base import Steps, Tool, ToolFamily, object_rules, repeated
from pymllm.text.tool_calls.json_object import ObjectCalls

INSTRUCTIONS = """You can call tools. These are their descriptions, each with the JSON schema of its arguments:
{tools}

To call a tool, answer with nothing but one line of JSON for each call:
{{"name": "NAME", "arguments": {{"ARGUMENT": VALUE}}}}
Its result is then told to you. If no tool is of use, answer as usual."""
FENCES = ("```json", "```")


class PlainJson(ToolFamily):
    """An answer that begins with objects is calls, if tools have these names."""

    name = "plain_json"
    arguments_key = "arguments"

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return PlainText(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        yield "calls: " + repeated("call", '"\\n"', most)
        yield from object_rules(tools, self.arguments_key)

    def optional(self, most: int, spell: Callable[[str], str]) -> list[str] | None:
        tag = f"({spell(self.markers[0])})? " if self.markers else ""
        return [f"perhaps: PLAIN | {tag}calls", r'PLAIN: /(?s:.*)/ & ~/(?s:\s*\{\s*"name".*)/']

    def instructions(self, tools: Sequence[Tool]) -> str:
        """Tell a model of its tools."""
        described = (json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools)
        return INSTRUCTIONS.format(tools="\n".join(described))


class PlainText(ObjectCalls):
    """The text of an answer in this family."""

    any_name = False

    def steps(self) -> Steps:
        start = self.at
        if (yield from self.skip_space()):
            fence = ""
            for text in FENCES:
                if not fence and (yield from self.take(text)):
                    fence = text
            read = (yield from self.skip_space()) and (yield from self.bare_calls())
            if read and fence:
                yield from self.take_after_space("```")
            if not read:
                self.at = start
        else:
            self.at = start
        return (yield from self.after_bare_calls())

    def bare_calls(self) -> Steps:
        """Read the calls at this place, objects in a row or in an array.  Returns whether there are any."""
        if self.buffer.startswith("[", self.at):
            return (yield from self.array_of_calls())
        if not (yield from self.object_call()):
            return False
        while True:
            end = self.at
            yield from self.take_after_space(";")
            if not (yield from self.skip_space()) or not (yield from self.object_call()):
                self.at = end
                return True

    def after_bare_calls(self) -> Steps:
        """Read what comes after the calls with which an answer begins."""
        while not self.final:
            self.say(len(self.buffer))
            self.buffer, self.at = "", 0
            yield
        self.say(len(self.buffer))
        return True
