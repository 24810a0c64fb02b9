"""Where links in a checkpoint's folder may lead: within the folder, or to the hub cache's own files."""

from __future__ import annotations

import os
from pathlib import Path

from pymllm.errors import CheckpointError

SNAPSHOTS, BLOBS = (
    "snapshots",
    "blobs",
)  # of a model in the hub's cache: links by revision, and the files themselves


def check_link(path: Path) -> None:
    """Raise CheckpointError "link-escapes" for a link that leads out of its folder, though not to a file of the cache.

    The folder itself may be a link: its user has named it.
    """
    if not path.is_symlink():
        return
    target, folder = os.path.realpath(path), os.path.realpath(path.parent)
    if not _within(target, folder) and not any(_within(target, blobs) for blobs in _blobs(path)):
        raise CheckpointError(
            "the file is a link that leads out of its folder",
            code="link-escapes",
            file=str(path),
            expected="a file, a link within the folder, or the hub cache's own link to one of its files",
            found=f"a link to {target}",
            fix="Put the file itself in the folder, if you know why it is a link.",
        )


def _blobs(path: Path) -> list[str]:
    """List the folders of files that a link at this path may lead to: of its own model, and of the user's cache."""
    places = [parent.parent / BLOBS for parent in path.absolute().parents if parent.name == SNAPSHOTS][:1]
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return [os.path.realpath(place) for place in places]
    # Older versions of the hub's client filled other folders with links into the cache.
    model = Path(os.path.realpath(path)).parent
    if model.name == BLOBS and model.parent.parent == Path(os.path.realpath(HF_HUB_CACHE)):
        places.append(model)
    return [os.path.realpath(place) for place in places]


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder
