"""What the answers to conversations share, whichever API asks: texts become parts (`text/parts.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pymllm.engine.request import RequestOutput
from pymllm.engine.session import StreamPiece
from pymllm.text.parts import Arguments, Content, Part, PartReader, Reasoning, ToolCall


@dataclass(frozen=True)
class WholeCall:
    """A call of a tool.  arguments: a JSON object, as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class WholeAnswer:
    """An answer whose parts are put together.

    content: None where there are calls alone.  reasoning: None: there is none.
    """

    content: str | None
    reasoning: str | None
    calls: tuple[WholeCall, ...]


class Conversation:
    """The readers of the answers to one request.  new_reader: makes the reader of one answer."""

    def __init__(self, new_reader: Callable[[], PartReader]) -> None:
        self.new_reader = new_reader
        self._readers: dict[int, PartReader] = {}
        self.called: set[int] = set()  # the answers that have called a tool

    def parts(self, index: int, piece: StreamPiece) -> list[Part]:
        """Return the parts that a piece of the answer `index` makes certain."""
        if index not in self._readers:
            self._readers[index] = self.new_reader()
        reader = self._readers[index]
        parts = reader.read(piece.text, final=piece.output is not None)
        if any(isinstance(part, ToolCall) for part in parts):
            self.called.add(index)
        return parts

    def whole(self, output: RequestOutput) -> WholeAnswer:
        """Return the parts of a finished answer, put together."""
        return join(self.new_reader().read(output.text, final=True))


def join(parts: list[Part]) -> WholeAnswer:
    """Put the parts of one answer together."""
    said = "".join(part.text for part in parts if isinstance(part, Content))
    thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = tuple(
        WholeCall(
            call.id,
            call.name,
            "".join(part.text for part in parts if isinstance(part, Arguments) and part.index == call.index),
        )
        for call in parts
        if isinstance(call, ToolCall)
    )
    return WholeAnswer(said if said or not calls else None, thought or None, calls)
