"""What the answers to conversations share, whichever API asks: texts become parts (`text/parts.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import StreamPiece, begin_text
from pymllm.text.parts import Arguments, Content, Part, PartReader, Reasoning, ToolCall
from pymllm.text.tokenizer import Tokenizer


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


def pieces_of(
    output: RequestOutput, tokenizer: Tokenizer, params: SamplingParams | None
) -> list[StreamPiece]:
    """Return a finished answer as the pieces of a stream.

    params: its settings, where each token is to be a piece, with its log-probability; None: one piece will do.
    """
    whole = StreamPiece(output.text, output.token_ids, output, output.logprobs)
    if params is None or output.logprobs is None or not tokenizer.available or not output.token_ids:
        return [whole]
    # A token that ends an answer is no part of its text.
    tries = (_texts_of(output.token_ids, tokenizer, params, ended) for ended in (False, True))
    texts = next((texts for texts in tries if "".join(texts) == output.text), None)
    if texts is None:
        return [whole]
    each = zip(texts, output.token_ids, output.logprobs, strict=True)
    pieces = [StreamPiece(text, (token,), None, (entry,)) for text, token, entry in each]
    return [*pieces[:-1], replace(pieces[-1], output=output)]


def _texts_of(
    token_ids: tuple[int, ...], tokenizer: Tokenizer, params: SamplingParams, ended: bool
) -> list[str]:
    """Return what each token adds to the text for certain.  ended: whether the last one adds nothing."""
    stream = begin_text(tokenizer, params)
    texts = [stream.push(token) for token in token_ids[:-1]]
    texts.append("" if ended else stream.push(token_ids[-1]))
    texts[-1] += stream.finish()
    return texts


def count_thinking(tokenizer: Tokenizer, text: str, most: int) -> int:
    """Count the tokens of what was thought, of `most` in all: those of its text, which others may spell as well."""
    if not text or not tokenizer.available:
        return 0
    return min(len(tokenizer.encode(text, add_special_tokens=False)), most)
