"""Answers of a model in a conversation, in pieces, and how they end: by the model, at a length, or by Ctrl+C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from pymllm.errors import PymllmError, RequestError
from pymllm.text.conversation import for_template
from pymllm.text.dialect import Dialect
from pymllm.text.parts import Arguments, Content, Reasoning, ToolCall
from pymllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pymllm.api import LLM
    from pymllm.engine.sampling import SamplingParams

TAIL = 16  # tokens of a prompt, in which a mark that it ends with is


@dataclass
class Answer:
    """An answer so far.

    said, thought: its text.  ended: what ended it; "stop": the model.  stopped_by: the stop string, if one did.
    prompt_tokens, cached_tokens: of its prompt, and how many of these were not read again.  tokens: its own.
    seconds: from its first token to its last.  full: whether the context has no room for more.
    """

    said: str = ""
    thought: str = ""
    ended: Literal["stop", "length", "stopped"] = "stopped"
    stopped_by: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    full: bool = False

    def message(self) -> dict[str, str]:
        """Make the message that the conversation keeps."""
        made = {"role": "assistant", "content": self.said}
        if self.thought:
            made["reasoning_content"] = self.thought
        return made if self.ended == "stop" else made | {"ended": self.ended}


class StopSignal:
    """A block in which Ctrl+C asks for the end of an answer; a second time it warns, and a third time it leaves.

    asked: how often it was pressed.
    """

    asked = 0

    def __enter__(self) -> StopSignal:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 2:
            # Past sys.stderr, which may be in the midst of a write.
            with contextlib.suppress(OSError):
                os.write(2, b"(Ctrl+C once more leaves, and the conversation is lost)\n")
        if self.asked > 2:
            raise SystemExit(128 + number)


def render(
    tokenizer: Tokenizer,
    dialect: Dialect,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> list[int]:
    """Encode a conversation up to where the assistant answers.  RequestError where the template refuses it."""
    if not dialect.takes_system and messages and messages[0]["role"] == "system":
        raise RequestError(
            "this model's chat template has no place for a system prompt",
            code="messages",
            tensor="system",
            fix="Say it in your first message.",
        )
    return tokenizer.apply_chat_template(for_template(messages, [], dialect), variables=variables)


class Answerer:
    """A loaded model that answers one conversation.  adapter: of every answer; None: none."""

    def __init__(self, llm: LLM, dialect: Dialect, adapter: str | None) -> None:
        self.llm, self.dialect, self.adapter = llm, dialect, llm.check_adapter(adapter)

    def count(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> int:
        """Count the tokens of a conversation as a prompt."""
        return len(render(self.llm.tokenizer, self.dialect, messages, variables))

    def params(self, chosen: Mapping[str, Any]) -> SamplingParams:
        """Make the settings of answers, which go on as long as there is room by default.  RequestError for bad ones."""
        kept = self.dialect.kept(with_tools=False)
        params = self.llm.default_params(**{"max_tokens": None, "kept_tokens": kept, **chosen})
        self.llm.engine.strategy.check(params)
        return params

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        chosen: Mapping[str, Any],
        variables: Mapping[str, Any],
        answer: Answer,
        stop: StopSignal | None = None,
    ) -> Iterator[Content | Reasoning]:
        """Answer a conversation: yield the parts as they come, and write what is known into `answer`.

        stop: tells when the answer is to end; None: Ctrl+C does what it always does.
        RequestError where the template refuses the messages, or they leave no room for an answer.
        """
        try:
            ids = render(self.llm.tokenizer, self.dialect, messages, variables)
            yield from self._run(ids, self.params(chosen), answer, stop)
        except PymllmError:
            # Ctrl+C reaches the process that renders templates, too.
            if stop is None or not stop.asked:
                raise

    def _run(
        self, ids: list[int], params: SamplingParams, answer: Answer, stop: StopSignal | None
    ) -> Iterator[Content | Reasoning]:
        dialect, llm = self.dialect, self.llm
        tail = llm.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False)
        opened = dialect.thoughts is not None and dialect.thoughts.opened_by(tail)
        reader, first = dialect.reader([], most=None, opened=opened), 0.0
        with llm.session() as session:
            session.add(ids, params, self.adapter)
            answer.prompt_tokens = len(ids)
            while session.unfinished and not (stop is not None and stop.asked):
                for request, piece in session.step():
                    if request.error is not None:
                        raise request.error
                    if piece is None:
                        continue
                    now = time.perf_counter()
                    first = first or now
                    answer.seconds, answer.cached_tokens = now - first, piece.cached_tokens
                    answer.tokens += len(piece.token_ids)
                    output = piece.output
                    if output is not None:
                        answer.ended = "length" if output.finish_reason == "length" else "stop"
                        answer.stopped_by = output.stopped_by
                        answer.full = answer.ended == "length" and answer.tokens != params.max_tokens
                    for part in reader.read(piece.text, final=output is not None):
                        yield from _note(part, answer)
        if answer.ended == "stopped":
            # What the reader held back was said.
            for part in reader.read("", final=True):
                yield from _note(part, answer)


def _note(part: object, answer: Answer) -> Iterator[Content | Reasoning]:
    """Add a part to the answer.  A call, which nobody has offered, is shown as the text that it is."""
    if isinstance(part, ToolCall):
        part = Content(f"{part.name} ")
    elif isinstance(part, Arguments):
        part = Content(part.text)
    if isinstance(part, Content):
        answer.said += part.text
        yield part
    elif isinstance(part, Reasoning):
        answer.thought += part.text
        yield part


@contextlib.contextmanager
def ends_on_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP leave the block by SystemExit, so that the terminal gets back what it was."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [(number, signal.getsignal(number)) for number in numbers]
    try:
        for number, handler in before:
            # nohup has it ignored.
            if handler is not signal.SIG_IGN:
                signal.signal(number, leave)
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
