"""Figures drawn by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError, MissingExtraError


def require_matplotlib() -> Any:
    """Return matplotlib's Figure.  MissingExtraError without it; so call this before what takes long."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "a plot") from None
    return Figure


def save_figure(figure: Any, file: str | Path) -> None:
    """Write a figure as SVG, or what the file's ending says.  ConfigError for a file that cannot be written."""
    import matplotlib

    try:
        # Words in an SVG stay words, that can be read and found.
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            figure.savefig(file)
    except (OSError, ValueError) as error:  # an ending that matplotlib does not know
        raise ConfigError(f"the plot cannot be written: {error}", code="plot", file=str(file)) from None
