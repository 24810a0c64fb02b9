"""The output of verbs: results go to stdout, the rest to stderr, both from rank 0 alone.

Names and texts may come from a hostile file: what a terminal could take for a command is shown `escaped`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from pymllm.errors import escaped
from pymllm.loading import progress

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a table that is not printed to a terminal.
PIPE_WIDTH = 200

# Whether the command runs with --quiet.
_quiet = False


def rank() -> int:
    """Return this process's rank under torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def first_rank_only() -> Iterator[None]:
    """Let only rank 0 print meanwhile; `main` still prints the errors of others, which may be theirs alone."""
    if rank() == 0:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def start_output(verbose: bool, quiet: bool = False) -> None:
    """Send the `pymllm` logger to stderr: one line for each phase if `verbose`, else warnings only.

    quiet: whether `say` says nothing, and no bar is shown.
    """
    global _quiet
    _quiet = quiet
    progress.hidden = quiet
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logger = logging.getLogger("pymllm")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if rank():
        logger.setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False


class _Lines(logging.Formatter):
    """A formatter whose messages are one line each, whatever names they have in them."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a message as `logging` does, and escape it."""
        return escaped(super().formatMessage(record))


def is_quiet() -> bool:
    """Tell whether the command runs with --quiet."""
    return _quiet


def say(text: str = "") -> None:
    """Print a text for people, to stderr; nothing under --quiet."""
    if not _quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a text for people that matters, to stderr, under --quiet too."""
    print(escaped(text, "\n"), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a result for people, to stdout."""
    print(escaped(text, "\n"))


def show_text(text: str) -> None:
    """Print a piece of a model's text to stdout, as it is; to a terminal, control characters `escaped`."""
    print(readable_text(text) if sys.stdout.isatty() else text, end="", flush=True)


def readable_text(text: str) -> str:
    """Write a model's text for a terminal: control characters `escaped`, all else as it is."""
    if text.isprintable():
        return text
    return "".join(escaped(letter, "\n\t") if is_control(letter) else letter for letter in text)


def is_control(letter: str) -> bool:
    """Tell whether a character is a control character, or half of a surrogate pair."""
    return unicodedata.category(letter) in ("Cc", "Cs")


def print_json(value: Any) -> None:
    """Print one JSON document to stdout.  NaN and infinities, which JSON does not have, become null.

    Characters that do not print are escaped as JSON has it, so that the document means the same.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        shown = (
            letter if letter.isprintable() or letter == "\n" else json.dumps(letter)[1:-1] for letter in text
        )
        text = "".join(shown)
    print(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, stderr: bool = False) -> Console:
    """Make a console for tables.  Nothing in the names of a checkpoint is markup for it, or a terminal's command."""
    from rich.console import Console
    from rich.text import Text

    class Escaping(Console):
        """A console that shows what does not print escaped."""

        def render_str(self, text: str, **options: Any) -> Text:
            """Turn a text into rich's own, escaped."""
            return super().render_str(escaped(text, "\n"), **options)

    stream = sys.stderr if stderr else sys.stdout
    # Not rich's own width, which is 80 for TERM=dumb however wide the terminal is.
    width = shutil.get_terminal_size().columns if stream.isatty() else PIPE_WIDTH
    styled = has_styles(stream)
    return Escaping(
        file=stream,
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=False,
        force_terminal=None if stream.isatty() else styled,
        color_system="auto" if styled else None,
        no_color=False,
        quiet=stderr and _quiet,
    )


def has_styles(stream: TextIO) -> bool:
    """Tell whether what is printed to a stream may have colours and bold type.

    In a terminal, unless NO_COLOR is set, CLICOLOR is 0, or TERM is dumb; elsewhere where FORCE_COLOR or CLICOLOR_FORCE
    asks for it (no-color.org, force-color.org, bixense.com/clicolors).
    """
    setting = os.environ.get
    if setting("NO_COLOR"):
        return False
    if any(setting(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return setting("CLICOLOR") != "0" and setting("TERM") != "dumb" and stream.isatty()


def readable_size(nbytes: float) -> str:
    """Write a size for people: in kB, MB or GB, a thousand of one to the next."""
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
