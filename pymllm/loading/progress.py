"""A progress bar: over the bytes of a load or of a checkpoint that is written, or over lines."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

# Whether whoever runs this process wants no bar at all.
hidden = False


def shows_bars() -> bool:
    """Tell whether a bar is shown where nobody asks for one or none: in a terminal that can go back in a line."""
    return not hidden and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def progress_bar(
    doing: str, total: int | None, show: bool | None, unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """Show a bar over `total` bytes.  Yields a function that takes the number of bytes just done.

    doing: the word before the bar.  show: whether to; None: as `shows_bars` says.
    total: None where nobody knows it.  unit: what is counted in place of bytes.
    """
    if not (shows_bars() if show is None else show):
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=doing, leave=False) as bar:
        yield bar.update
