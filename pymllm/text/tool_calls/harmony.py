"""<|channel|>CHANNEL<|message|>TEXT, one message after the other: gpt-oss, whose channels are what it thinks and says.

`analysis` is thought, `final` is said, and so is `commentary`, unless its header has `to=functions.NAME`: then the text
is the arguments of a call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

from pymllm.text.parts import Content, PartReader, Reasoning
from pymllm.text.tool_calls.base import (
    AnswerText,
    Steps,
    Tool,
    ToolFamily,
    beginning_at_the_end,
    json_rule,
    literal,
    parse_object,
)

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]{1,128})")
# How an answer may begin that goes on with the prompt's header.
FIRST = (" to=functions.", "to=functions.")
NAMED = re.compile(r"\s*(\w+)")


class Harmony(ToolFamily):
    """Messages on channels; a call ends the answer."""

    name = "harmony"
    markers = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)

    def reader(self, names: Collection[str], most: int | None) -> PartReader:
        return HarmonyText(self, names, most)

    def rules(self, tools: Sequence[Tool], most: int, spell: Callable[[str], str]) -> Iterator[str]:
        yield self.thought_rule(spell)
        yield "calls: thinks? (" + " | ".join(f"call_{index}" for index in range(len(tools))) + ")"
        for index, tool in enumerate(tools):
            to = literal(f"commentary to=functions.{tool.name} ")
            yield (
                f'call_{index}: {spell(CHANNEL)} {to} {spell(CONSTRAIN)} "json" {spell(MESSAGE)} args_{index}'
            )
            yield json_rule(f"args_{index}", tool.schema)

    def optional(self, most: int, spell: Callable[[str], str]) -> list[str] | None:
        return None

    def before_answer(self, spell: Callable[[str], str]) -> str:
        return f'thinks? {spell(CHANNEL)} "final" {spell(MESSAGE)}'

    def thought_rule(self, spell: Callable[[str], str]) -> str:
        thought = f'{spell(CHANNEL)} "analysis" {spell(MESSAGE)} /(?s:.*)/'
        return f'thinks: {thought} {spell(ENDS[0])} {spell(START)} "assistant"'


class HarmonyText(AnswerText):
    """The text of an answer in this family.  What is no message is content."""

    def steps(self) -> Steps:
        while True:
            while not self.buffer[self.at :]:
                if self.final:
                    return True
                yield
            if not (yield from self._message()):
                break
        while not self.final:
            self.say(len(self.buffer))
            yield
        return True

    def _message(self) -> Steps:
        """Read one message.  Returns False, and reads nothing, where there is none."""
        start = self.at
        if not self._begins_message():
            if self.final or not any(mark.startswith(self.buffer[start:]) for mark in self._begins()):
                return False
            yield
            return True
        while (found := self.buffer.find(MESSAGE, start)) < 0:
            if self.final or len(self.buffer) - start > 1024:
                return False
            yield
        header = self.buffer[start:found]
        self.at = found + len(MESSAGE)
        recipient = RECIPIENT.search(header)
        channel = NAMED.match(header.partition(CHANNEL)[2])
        thinks = channel is not None and channel.group(1) == "analysis"
        call, begun = None, False
        while True:
            ends = [(at, mark) for mark in (*ENDS, START) if (at := self.buffer.find(mark, self.at)) >= 0]
            stop, mark = min(ends, default=(len(self.buffer), ""))
            whole = bool(ends) or self.final
            if not whole:
                stop -= max(beginning_at_the_end(self.buffer, self.at, one) for one in (*ENDS, START))
            text = self.buffer[self.at : stop]
            if recipient is not None and not begun:
                if not text.strip() and not whole:
                    yield
                    continue
                if not text.lstrip().startswith("{") or (whole and parse_object(text) is None):
                    self.at = start
                    self.say(stop + (len(mark) if mark in ENDS else 0))
                    return True
                call, begun = self.begin_call(recipient.group(1)), True
            self.at = stop
            if recipient is not None:
                self.add_arguments(call, text)
            elif text:
                self._parts.append(Reasoning(text) if thinks else Content(text))
            if whole:
                self.at += len(mark) if mark in ENDS else 0
                return True
            yield

    def _begins_message(self) -> bool:
        return self.buffer.startswith(self._begins(), self.at)

    def _begins(self) -> tuple[str, ...]:
        return (START, CHANNEL, *(FIRST if self.at == 0 else ()))
