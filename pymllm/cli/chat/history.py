"""The lines that were typed before, in a file of one JSON string a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import History

from pymllm.disk import write_whole
from pymllm.errors import PymllmError

# What is longer was pasted.
LONGEST_LINE = 10_000
MOST_LINES, MOST_BYTES = 1000, 1 << 20


def history_file() -> Path | None:
    """Return where lines are kept; None: there is no place for them."""
    kept = os.environ.get("XDG_STATE_HOME")
    try:
        folder = Path(kept) if kept and os.path.isabs(kept) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return folder / "pymllm" / "chat_history.jsonl"


class InputHistory(History):
    """The lines of earlier chats and of this one.  file: None, or one that cannot be used: those of this one alone."""

    def __init__(self, file: Path | None) -> None:
        super().__init__()
        self.file = file

    def load_history_strings(self) -> Iterable[str]:
        """Read the lines, the newest first; a file that has grown long is cut to its newest."""
        lines: list[bytes] = []
        if self.file is not None:
            with contextlib.suppress(OSError, PymllmError):
                if self.file.is_file():
                    with open(self.file, "rb") as kept:
                        size = kept.seek(0, os.SEEK_END)
                        kept.seek(max(size - MOST_BYTES, 0))
                        lines = kept.read(MOST_BYTES).splitlines(keepends=True)
                    if size > MOST_BYTES or len(lines) > MOST_LINES:
                        lines = lines[-MOST_LINES // 2 :]
                        write_whole(self.file, lines)
                        self.file.chmod(0o600)
        for line in reversed(lines):
            with contextlib.suppress(ValueError, RecursionError):
                text = json.loads(line)
                if isinstance(text, str):
                    yield text

    def store_string(self, string: str) -> None:
        """Add a line to the file, which only its user may read."""
        if self.file is None or len(string) > LONGEST_LINE:
            return
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "wb") as kept:
                kept.write(json.dumps(string).encode() + b"\n")
