"""A progress bar: over the bytes of a load or of a checkpoint that is written, or over lines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from pymllm.errors import escaped


class Progress:
    """A bar, or none.  Called with a number of bytes it moves on."""

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar

    def __call__(self, nbytes: int) -> None:
        """Move on by this many bytes."""
        if self.bar is not None:
            self.bar.update(nbytes)

    def at(self, name: str) -> None:
        """Show behind the bar what is being done."""
        if self.bar is not None:
            self.bar.set_postfix_str(escaped(name))


# Whether whoever runs this process wants no bar at all.
hidden = False


def shows_bars() -> bool:
    """Tell whether a bar is shown where nobody asks for one or none: in a terminal that can go back in a line."""
    return not hidden and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress_bar(doing: str, total: int | None, show: bool | None, unit: str = "B") -> Iterator[Progress]:
    """Show a bar over `total` bytes.  Yields what takes the number of bytes just done.

    doing: the word before the bar.  show: whether to; None: as `shows_bars` says.
    total: None where nobody knows it.  unit: what is counted in place of bytes.
    """
    if not (shows_bars() if show is None else show):
        yield Progress()
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=doing, leave=False) as bar:
        yield Progress(bar)
