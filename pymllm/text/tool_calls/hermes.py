"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5 and Qwen3, SmolLM3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from pymllm.text.parts import PartReader
from pymllm.text.tool_calls.base import Steps, Tool, ToolFamily, literal, object_rules, repeated
from pymllm.text.tool_calls.json_object import ObjectCalls

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFamily):
    """Calls between tags, one object each; text may come before them."""

    name = "hermes"
    markers = (OPEN, CLOSE)

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return HermesText(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        yield "calls: " + repeated("one_call", '"\\n"', most)
        yield f'one_call: {spell(OPEN)} "\\n" call "\\n" {spell(CLOSE)}'
        yield from object_rules(tools, "arguments")

    def optional(self, most: int, spell: Callable[[str], str]) -> list[str] | None:
        further = f' ("\\n" one_call){{0,{most - 1}}}' if most > 1 else ""
        return super().optional(most, spell) or [
            f'perhaps: PLAIN | begin_call "\\n" call "\\n" {spell(CLOSE)}{further}',
            f"PLAIN: /(?s:.*)/ & ~/(?s:.*{OPEN}.*)/",
            f"begin_call[suffix={literal(OPEN)}]: /(?s:.*)/",
        ]


class HermesText(ObjectCalls):
    """The text of an answer in this family."""

    def steps(self) -> Steps:
        while (yield from self.say_until(OPEN)):
            start = self.at
            self.at += len(OPEN)
            if (yield from self.skip_space()) and (yield from self.object_call()):
                yield from self.take_after_space(CLOSE)
            else:
                self.at = start
                self.say(start + len(OPEN))
        return True
