"""The lines of a user: edited in a terminal, typed into one that knows no commands, or read from a pipe.

What begins with three quotes goes on to the line that ends with three.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from pymllm.cli.output import say
from pymllm.errors import RequestError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import Output

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
# A line of a pipe that is longer is no message.
MAX_LINE = 64 << 20


class EmptyInterrupt(KeyboardInterrupt):
    """Ctrl+C where nothing was typed."""


def is_open(text: str) -> bool:
    """Tell whether a text begins with three quotes that no further three end."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def unquoted(text: str) -> str | None:
    """Return what stands between three quotes; None: the text is not in such."""
    text = text.strip()
    if not text.startswith(QUOTES) or is_open(text):
        return None
    return text[len(QUOTES) : -len(QUOTES)].strip("\n")


class Reader(ABC):
    """A source of what the user says.  interactive: whether somebody sees the prompts."""

    interactive = True

    def read(self) -> str:
        """Read the next message or command.

        EOFError at the end, KeyboardInterrupt for Ctrl+C, RequestError for what is no text.
        """
        text = self._line(PROMPT)
        lines = [text]
        while is_open(text):
            try:
                lines.append(self._line(MORE))
            except EOFError:
                raise RequestError(
                    "the input ends inside a block that begins with three quotes",
                    code="input",
                    tensor="input",
                    fix=f"End the block with a line that ends with {QUOTES}.",
                ) from None
            text = "\n".join(lines)
        return text

    @abstractmethod
    def _line(self, prompt: str) -> str:
        """Read a line, without its end."""


class PipeReader(Reader):
    """A reader of stdin where that is no terminal: each line is a message or a command."""

    interactive = False

    def _line(self, prompt: str) -> str:
        source = getattr(sys.stdin, "buffer", None)
        data = source.readline(MAX_LINE) if source is not None else sys.stdin.readline(MAX_LINE).encode()
        if not data:
            raise EOFError
        if len(data) >= MAX_LINE:
            raise RequestError(
                "a line of the input is too long",
                code="input",
                tensor="input",
                expected=f"under {MAX_LINE} bytes",
            )
        try:
            text: str = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                "a line of the input is no text",
                code="input",
                tensor="input",
                expected="UTF-8",
                found=f"byte 0x{data[error.start]:02x} at {error.start}",
            ) from None
        return text.rstrip("\r\n")


class PlainReader(Reader):
    """A reader of a terminal that knows no commands: the terminal itself edits the line."""

    def _line(self, prompt: str) -> str:
        try:
            # Answers alone go to a stdout that is no terminal.
            shown = sys.stdout if sys.stdout.isatty() else sys.stderr
            print(prompt, end="", file=shown, flush=True)
            wait_for_input()
            data = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            say()
            raise EmptyInterrupt from None
        if not data:
            say()
            raise EOFError
        try:
            return data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise RequestError(
                "a line is no text in UTF-8", code="input", tensor="input", found=str(error)
            ) from None


def wait_for_input() -> None:
    """Wait until stdin has something to read, or a signal comes, whose handler then runs.

    Unlike in `input`, a Ctrl+C just before the wait is not left until the next key: what a signal writes ends the wait.
    """
    if os.name == "nt":  # where a console cannot be waited for
        return
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            while sys.stdin not in select.select([sys.stdin, receiver], [], [])[0]:
                receiver.recv(4096)
        finally:
            signal.set_wakeup_fd(before)


class EditedReader(Reader):
    """A reader with an editor of lines, which knows the lines of earlier chats and completes commands and paths."""

    def __init__(self) -> None:
        self._session = make_session()

    def _line(self, prompt: str) -> str:
        # A block is whole before Enter sends it.
        text: str = self._session.prompt()
        return text.encode("utf-8", "replace").decode("utf-8")


def make_session() -> PromptSession[str]:
    """Make the editor: Enter sends, Alt+Enter begins a new line, and so does Enter in a block of three quotes."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.color_depth import ColorDepth
    from prompt_toolkit.shortcuts import CompleteStyle

    from pymllm.cli.chat.completing import ChatCompleter
    from pymllm.cli.chat.history import InputHistory, history_file

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        typed = bool(event.current_buffer.text)
        event.app.exit(exception=KeyboardInterrupt() if typed else EmptyInterrupt())

    return PromptSession(
        PROMPT,
        multiline=True,
        prompt_continuation=MORE,
        key_bindings=keys,
        completer=ChatCompleter(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        history=InputHistory(history_file()),
        color_depth=ColorDepth.DEPTH_1_BIT,
        enable_open_in_editor=False,
        output=_output(),
    )


def _output() -> Output:
    """Make what the editor draws on, the terminal on stdout, or else on stderr."""
    from prompt_toolkit.output import create_output

    output = create_output(always_prefer_tty=True)
    # Not every terminal answers where its cursor is, and nothing here needs to know.
    if hasattr(output, "enable_cpr"):
        output.enable_cpr = False
    return output


def choose_reader() -> Reader:
    """Choose how stdin is read."""
    from pymllm.cli.chat.screen import is_plain_terminal

    if not sys.stdin.isatty():
        return PipeReader()
    seen = sys.stdout.isatty() or sys.stderr.isatty()
    return PlainReader() if is_plain_terminal() or not seen else EditedReader()
