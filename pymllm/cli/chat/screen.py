"""What a chat shows: answers on stdout; thoughts, notes and errors on stderr.

On a terminal lines break between words, thoughts and notes are dim, and control characters of a model's text or a
file's name are escaped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from pymllm.cli.output import is_quiet, readable_text
from pymllm.errors import PymllmError, escaped

if TYPE_CHECKING:
    from pymllm.cli.chat.wrapping import Wrapper

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
NARROWEST, WIDEST = 16, 100
NEWLINE = "\n"


def columns() -> int:
    """Return how wide the terminal is."""
    return shutil.get_terminal_size().columns


def is_plain_terminal() -> bool:
    """Tell whether the terminal knows no commands."""
    return os.environ.get("TERM", "") in ("", "dumb", "unknown")


class Screen:
    """The two streams as one place, where each kind of text begins on a line of its own."""

    def __init__(self) -> None:
        self._wrapper: Wrapper | None = None
        self._kind = ""
        self._ends_line = True

    def answer(self, text: str) -> None:
        """Show a piece of what the model says."""
        self._begin("answer")
        self._put(sys.stdout, text, self._wrapper)

    def thought(self, text: str) -> None:
        """Show a piece of what the model thinks."""
        self._begin("thought")
        self._put(sys.stderr, text, self._wrapper, dim=True)

    def end(self) -> None:
        """End the line that an answer has come to."""
        self._begin("")

    def note(self, text: str, indent: str = "") -> None:
        """Show a remark in lines that fit.  indent: before what continues a line."""
        self.end()
        self._put(sys.stderr, f"{fill(escaped(text, NEWLINE), indent)}\n", None, dim=True)

    def remark(self, text: str) -> None:
        """Show a remark that nobody asked for; nothing under --quiet."""
        if not is_quiet():
            self.note(text)

    def error(self, error: PymllmError | str) -> None:
        """Show an error."""
        self.end()
        text = f"error: {error}"
        self._put(sys.stderr, f"{fill(text) if sys.stderr.isatty() else text}\n", None)

    def _begin(self, kind: str) -> None:
        """Begin to show a kind of text: what was held back comes first, and its line ends."""
        if kind == self._kind:
            return
        last = self._stream(self._kind)
        if self._wrapper is not None:
            rest, self._wrapper = self._wrapper.flush(), None
            self._put(last, rest, None, dim=self._kind == "thought")
        if not self._ends_line:
            self._put(last, "\n", None)
        if self._kind == "thought" and kind == "answer" and sys.stdout.isatty():
            self._put(last, "\n", None)
        self._kind = kind
        if kind and self._stream(kind).isatty():
            from pymllm.cli.chat.wrapping import Wrapper

            self._wrapper = Wrapper(columns)

    @staticmethod
    def _stream(kind: str) -> TextIO:
        return sys.stdout if kind == "answer" else sys.stderr

    def _put(self, stream: TextIO, text: str, wrapper: Wrapper | None, *, dim: bool = False) -> None:
        if stream.isatty():
            text = readable_text(text)
        elif stream is sys.stderr:
            text = escaped(text, "\n\t")
        if wrapper is not None:
            text = wrapper.feed(text)
        if not text:
            return
        self._ends_line = text.endswith("\n")
        if dim and stream.isatty() and not os.environ.get("NO_COLOR") and not is_plain_terminal():
            text = f"{DIM}{text}{PLAIN}"
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Have the terminal keep what is typed meanwhile for the next prompt, and not show it inside an answer."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, OSError, ValueError):
        yield
        return
    except termios.error:
        # No terminal.
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def fill(text: str, indent: str = "") -> str:
    """Break lines that are longer than the terminal, or than is easy to read; a long word, a path say, stays whole.

    indent: before what continues a line.
    """
    width = min(max(columns(), NARROWEST), WIDEST)
    # In a narrow terminal there is no room for columns.
    indent = indent if 2 * len(indent) <= width else "  "
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(wrapper.fill(line) if len(line) > width else line for line in text.split("\n"))
