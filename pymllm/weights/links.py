"""Where links in a checkpoint's folder may lead: within the folder, or to the hub cache's own files."""

from __future__ import annotations

import os
from pathlib import Path

from pymllm.disk import reading
from pymllm.errors import CheckpointError

SNAPSHOTS, BLOBS = (
    "snapshots",
    "blobs",
)  # of a model in the hub's cache: links by revision, and the files themselves


def check_link(path: Path) -> None:
    """Raise CheckpointError "link-escapes" for a link that leads out of its folder, though not to a file of the cache.

    The folder itself may be a link: its user has named it.
    """
    with reading(path):
        if not path.is_symlink():
            return
    target = os.path.realpath(path)
    if not _within(target, path.parent) and not _is_own_blob(path, target) and not _is_cached(target):
        raise CheckpointError(
            "the file is a link that leads out of its folder",
            code="link-escapes",
            file=str(path),
            expected="a file, a link within the folder, or the hub cache's own link to one of its files",
            found=f"a link to {target}",
            fix="Put the file itself in the folder, if you know why it is a link.",
        )


def _is_own_blob(path: Path, target: str) -> bool:
    """Tell whether a link of a model's snapshot in the hub's cache leads to a file of that model."""
    # As the real folder has it: a user may have named a link to the snapshot.
    folder = Path(os.path.realpath(path.parent))
    snapshots = next((place for place in (folder, *folder.parents) if place.name == SNAPSHOTS), None)
    return snapshots is not None and _within(target, snapshots.parent / BLOBS)


def _is_cached(target: str) -> bool:
    """Tell whether a file is one of the user's hub cache, to which older versions of the hub's client made links."""
    blobs = Path(target).parent
    if blobs.name != BLOBS:
        return False
    from huggingface_hub.constants import HF_HUB_CACHE

    return blobs.parent.parent == Path(os.path.realpath(HF_HUB_CACHE))


def _within(target: str, folder: Path) -> bool:
    return Path(os.path.realpath(folder)) in Path(target).parents
