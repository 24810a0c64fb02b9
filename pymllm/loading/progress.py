"""A progress bar: over the bytes of a load or of a checkpoint that is written, or over lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(
    doing: str, total: int | None, show: bool | None, unit: str = "B"
) -> Iterator[Callable[[int], object]]:
    """Show a bar over `total` bytes.  Yields a function that takes the number of bytes just done.

    doing: the word before the bar.  show: whether to; None: only where standard error is a terminal.
    total: None where nobody knows it.  unit: what is counted in place of bytes.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda nbytes: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=doing, leave=False) as bar:
        yield bar.update
