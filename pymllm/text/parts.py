"""The parts of an assistant's answer: what it says, what it thinks before, and the tools that it calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Content:
    """A piece of what is said to the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """The beginning of a call of a tool.  index: counts the answer's calls, from 0.  id: what its result refers to."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A piece of a call's arguments, which together are one JSON object.  index: of the call, which has begun."""

    index: int
    text: str


Part = Content | Reasoning | ToolCall | Arguments


class PartReader(Protocol):
    """A reader of one answer's text, which comes in pieces."""

    def read(self, text: str, *, final: bool) -> list[Part]:
        """Return the parts that have become certain with this piece.  final: no piece follows."""


class ContentReader:
    """A reader that takes the whole text for what is said to the user."""

    def read(self, text: str, *, final: bool) -> list[Part]:
        return [Content(text)] if text else []
