"""What a model thinks before it answers, between the marks of its family, told apart from what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pymllm.text.parts import Part, PartReader, Reasoning
from pymllm.text.tool_calls.base import beginning_at_the_end, end_of_space


@dataclass(frozen=True)
class Thoughts:
    """The way in which the models of a family mark what they think.

    starts, ends: the marks, of which models write one each.  wrap: marks around what is said afterwards.
    """

    name: str
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    wrap: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.starts, *self.ends)

    def opened_by(self, prompt: str, continued: str | None = None) -> bool:
        """Tell whether an answer begins inside thoughts.

        continued: the assistant's text that the answer goes on with, if it does.
        """
        if continued is None:
            return prompt.rstrip().endswith(self.starts)
        return self._last(continued, self.starts) > self._last(continued, self.ends)

    def closed_by(self, prompt: str) -> bool:
        """Tell whether a prompt ends with thoughts, which leaves no room for others."""
        return prompt.rstrip().endswith(self.ends)

    @staticmethod
    def _last(text: str, marks: Sequence[str]) -> int:
        return max(text.rfind(mark) for mark in marks)


THINK = Thoughts("think", ("<think>",), ("</think>",))
MISTRAL = Thoughts("mistral", ("[THINK]",), ("[/THINK]",))
GRANITE = Thoughts(
    "granite",
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)
# Granite 3.3, whose answers are between marks, too.
GRANITE_TAGS = Thoughts("granite_tags", ("<think>",), ("</think>",), ("<response>", "</response>"))


class ThoughtReader:
    """A reader that takes the thoughts with which an answer begins out of it.

    White space around the marks belongs to them. Thoughts that do not end are thoughts up to the end.
    says: reads what is said afterwards.  opened: whether the prompt ends with the mark that begins them.
    """

    def __init__(self, family: Thoughts, says: PartReader, opened: bool) -> None:
        self.family, self.says = family, says
        self.buffer = ""
        self._place = "thoughts" if opened else "start"
        self._thought = False  # whether thoughts have been given out

    def read(self, text: str, *, final: bool) -> list[Part]:
        """Return the parts that have become certain with this piece.  final: no piece follows."""
        self.buffer += text
        parts: list[Part] = []
        if self._place == "start":
            self._find_start(final)
        if self._place == "thoughts":
            parts += self._read_thoughts(final)
        if self._place == "between":
            self.buffer = self.buffer.lstrip()
            self._place = (
                "between" if not self.buffer and not final else "wrap" if self.family.wrap else "said"
            )
        if self._place == "wrap":
            self._unwrap(final)
        if self._place == "wrapped":
            parts += self._read_wrapped(final)
        elif self._place == "said":
            said, self.buffer = self.buffer, ""
            parts += self.says.read(said, final=final)
        return parts

    def _find_start(self, final: bool) -> None:
        begins = end_of_space(self.buffer, 0)
        head = self.buffer[begins:]
        for mark in self.family.starts:
            if head.startswith(mark):
                self.buffer, self._place = head[len(mark) :], "thoughts"
                return
        if final or not any(mark.startswith(head) for mark in self.family.starts):
            self._place = "said"

    def _read_thoughts(self, final: bool) -> list[Part]:
        if not self._thought:
            self.buffer = self.buffer.lstrip()
        found = [(at, mark) for mark in self.family.ends if (at := self.buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            thought, self.buffer = self.buffer[:at].rstrip(), self.buffer[at + len(mark) :]
            self._place = "between"
        elif final:
            thought, self.buffer = self.buffer.rstrip(), ""
        else:
            held = max(beginning_at_the_end(self.buffer, 0, mark) for mark in self.family.ends)
            thought = self.buffer[: len(self.buffer) - held].rstrip()
            self.buffer = self.buffer[len(thought) :]
        if not thought:
            return []
        self._thought = True
        return [Reasoning(thought)]

    def _unwrap(self, final: bool) -> None:
        opening = self.family.wrap[0]
        if self.buffer.startswith(opening):
            self.buffer, self._place = self.buffer[len(opening) :], "wrapped"
        elif final or not opening.startswith(self.buffer):
            self._place = "said"

    def _read_wrapped(self, final: bool) -> list[Part]:
        closing = self.family.wrap[1]
        found = self.buffer.find(closing)
        if found >= 0:
            said, self.buffer = self.buffer[:found], self.buffer[found + len(closing) :]
            self._place = "said"
            parts = self.says.read(said, final=False)
            rest, self.buffer = self.buffer, ""
            return [*parts, *self.says.read(rest, final=final)]
        held = 0 if final else beginning_at_the_end(self.buffer, 0, closing)
        said = self.buffer[: len(self.buffer) - held]
        self.buffer = self.buffer[len(said) :]
        return self.says.read(said, final=final)
