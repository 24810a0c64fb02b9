"""{"name": ..., "parameters": {...}}, with or without <|python_tag|> before it: Llama 3.1 to 3.3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from pymllm.text.parts import PartReader
from pymllm.text.tool_calls.base import Steps, Tool, object_rules, repeated
from pymllm.text.tool_calls.plain_json import PlainJson, PlainText

TAG = "<|python_tag|>"


class Llama3Json(PlainJson):
    """An answer is calls if it begins with objects whose names tools have, or where the tag is."""

    name = "llama3_json"
    markers = (TAG,)

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return Llama3Text(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        yield "calls: " + repeated("call", '"; "', most)
        yield from object_rules(tools, "parameters")


class Llama3Text(PlainText):
    """The text of an answer in this family."""

    def after_bare_calls(self) -> Steps:
        self.any_name = True
        while (yield from self.say_until(TAG)):
            start = self.at
            self.at += len(TAG)
            if not (yield from self.skip_space()) or not (yield from self.bare_calls()):
                self.at = start
                self.say(start + len(TAG))
        return True
