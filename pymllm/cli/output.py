"""The output of verbs: results go to stdout, the rest to stderr, both from rank 0 alone."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Columns of a table that is not printed to a terminal.
PIPE_WIDTH = 200


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


def start_logging(verbose: bool) -> None:
    """Send the `pymllm` logger to stderr: one line for each phase if `verbose`, else warnings only."""
    logger = logging.getLogger("pymllm")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if rank():
        logger.setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger.handlers, logger.propagate = [handler], False


def say(text: str = "") -> None:
    """Print a line for people, to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout.  NaN and infinities, which JSON does not have, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console(*, stderr: bool = False) -> Console:
    """Make a console for tables.  It prints names from a checkpoint as they are: nothing in them is markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False)


def readable_size(nbytes: float) -> str:
    """Write a size for people: in kB, MB or GB, a thousand of one to the next."""
    if nbytes < 1e6:
        return f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
