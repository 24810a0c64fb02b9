"""The small trained model that comes with the package."""

from __future__ import annotations

from pathlib import Path


def shipped_model() -> Path:
    """Return the folder of the small trained model that comes with the package."""
    return Path(__file__).parents[1] / "shipped_model"
