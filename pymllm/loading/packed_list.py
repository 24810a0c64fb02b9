"""The packed weights that are kept, model by model, and how to be rid of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pymllm.disk import writing
from pymllm.loading.packed_cache import kept_files
from pymllm.loading.packed_file import UnfitError, read_header


@dataclass(frozen=True)
class KeptWeights:
    """A file of packed weights.

    model: the folder or .gguf file that they were packed of; None: the file is damaged.  size: in bytes.
    last_used: in seconds since 1970.
    """

    path: Path
    model: Path | None
    size: int
    last_used: float


def kept_weights(folder: Path) -> list[KeptWeights]:
    """List the packed weights that a folder keeps, the one used longest ago first."""
    return [
        KeptWeights(path, _model(path), found.st_size, found.st_mtime) for path, found in kept_files(folder)
    ]


def _model(path: Path) -> Path | None:
    try:
        return Path(read_header(path)[0]["account"]["model"])
    except (UnfitError, OSError, ValueError, KeyError, TypeError):
        return None


def remove_kept(kept: Iterable[KeptWeights]) -> None:
    """Remove files of packed weights.  ConfigError where that is not allowed."""
    for one in kept:
        with writing(one.path):
            one.path.unlink(missing_ok=True)
