"""A tokenizer of a foreign file, tried in a process of its own before it is loaded in this one.

The `tokenizers` library panics on some files, and on some it aborts its process.
"""

from __future__ import annotations

import threading
from pathlib import Path

from pymllm.errors import CheckpointError
from pymllm.text.bounded import Program, Stopped, encoded, readable
from pymllm.weights.links import check_link
from pymllm.weights.tensor_file import Descriptor

MAX_SECONDS = 30.0
CLOCK_SECONDS = 120.0
MAX_MEMORY = 4 << 30

SHIPPED = Path(__file__).parents[1] / "shipped_model"

LOADER = Program("tokenizers_files", ("tokenizers",), MAX_MEMORY, kept=0)

# Files that were read without harm, by path, device, inode, size and time.
_harmless: set[tuple[str, int, int, int, int]] = set()
_lock = threading.Lock()


def check_file(file: Path) -> None:
    """Try a tokenizer.json.  CheckpointError for one that cannot be read; each file is tried once."""
    Descriptor(file)  # a regular file, for which nobody waits
    check_link(file)
    file = file.resolve()
    # What comes with the package is known.
    if file.parent == SHIPPED:
        return
    with _lock:
        try:
            about = file.stat()
        except OSError as error:
            raise CheckpointError(
                f"the tokenizer cannot be read: {error}", code="tokenizer", file=str(file)
            ) from None
        identity = (str(file), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        if identity not in _harmless:
            _check({"file": str(file)}, str(file))
            _harmless.add(identity)


def check_text(text: str, file: str) -> None:
    """Try the text of a tokenizer.json that stands in another file.  CheckpointError if it cannot be read."""
    _check({"text": text}, file)


def _check(asked: dict[str, str], file: str) -> None:
    try:
        with LOADER.process() as process:
            reply = process.ask(encoded({"seconds": MAX_SECONDS, **asked}), CLOCK_SECONDS)
    except Stopped as stopped:
        problem = str(stopped)
    else:
        problem = next((reply[name] for name in ("invalid", "failed", "limit") if name in reply), "")
    if problem:
        raise CheckpointError(
            f"the tokenizer cannot be read: {readable(problem)}",
            code="tokenizer",
            file=file,
            fix="Pass token ids, or copy a whole tokenizer.json beside the weights.",
        )
