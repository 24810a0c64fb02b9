"""Files that appear whole or not at all, and errors of reading and writing that say what to do."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from pymllm.errors import NEAREST, CheckpointError, ConfigError, PymllmError, counted, nearest

P = ParamSpec("P")
T = TypeVar("T")

# What the system says when a file cannot be written: our code, and what to do. More is said of a full disk.
CODES = {
    errno.ENOSPC: "disk-full",
    errno.EDQUOT: "disk-full",
    errno.EFBIG: "file-too-large",
    errno.EROFS: "read-only",
    errno.EACCES: "read-only",
    errno.EPERM: "read-only",
}
FIXES = {
    "disk-full": "Free some room.",
    "file-too-large": "Raise the limit of a file's size (ulimit -f), or write to another file system.",
    "read-only": "Check the permissions, or write elsewhere.",
    "unwritable": "Check the disk, or write elsewhere.",
}


@contextlib.contextmanager
def writing(path: Path, nbytes: int = 0, *, again: str = "") -> Iterator[None]:
    """Raise a ConfigError, as `cannot_write` makes it, for an OSError of the block."""
    try:
        yield
    except OSError as error:
        named = error.filename2 or error.filename
        if isinstance(named, (str, bytes)):
            path = Path(os.fsdecode(named))
        raise cannot_write(path, error, nbytes, again=again) from error


@contextlib.contextmanager
def reading(path: Path, code: str = "unreadable") -> Iterator[None]:
    """Raise a CheckpointError for an OSError of the block, which reads the file at `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the file cannot be read: {reason(error)}",
            code=code,
            file=str(path),
            fix="Check the path, its permissions and the disk.",
        ) from error


def check_path(path: Path) -> None:
    """Raise ConfigError "path" for what the system takes for no path at all, whatever is there."""
    try:
        os.lstat(path)
    except OSError:
        return
    except ValueError as error:
        raise ConfigError(
            f"this is no path: {error}",
            code="path",
            file=str(path),
            expected="a name without the character 0, of characters that the system can spell",
            fix="Choose another path.",
        ) from error


def names_files(work: Callable[P, T]) -> Callable[P, T]:
    """Have a function that reads files raise a CheckpointError for an OSError, as of a folder that may not be entered.

    Its first path is that of what it reads, should the error not name one.
    """

    @functools.wraps(work)
    def wrapper(*args: P.args, **options: P.kwargs) -> T:
        try:
            return work(*args, **options)
        except OSError as error:
            # An optional package that is missing, or a program that is, is no file of a checkpoint.
            if isinstance(error, PymllmError):
                raise
            named = error.filename if isinstance(error.filename, (str, bytes)) else None
            paths = [arg for arg in (*args, *options.values()) if isinstance(arg, (str, Path))]
            path = Path(os.fsdecode(named)) if named else Path(paths[0] if paths else ".")
            with reading(path):
                raise

    return wrapper


def cannot_write(path: Path, error: OSError, nbytes: int = 0, *, again: str = "") -> ConfigError:
    """Make the error for a file that cannot be written.

    nbytes: how many it has, as far as that is known.  again: what a further try would do.
    """
    code = CODES.get(error.errno or 0, "unwritable")
    fix, expected, found = FIXES[code], None, None
    if code == "disk-full":
        free = free_bytes(path)
        expected = f"room for {counted(nbytes, 'byte')}" if nbytes else None
        found = None if free is None else f"{counted(free, 'byte')} free"
        if nbytes and free is not None and nbytes > free:
            fix = f"Free at least {counted(nbytes - free, 'byte')}."
        if error.errno == errno.EDQUOT:
            fix = f"{fix} It is your quota that is used up."
    return ConfigError(
        f"the file cannot be written: {reason(error)}",
        code=code,
        file=str(path),
        expected=expected,
        found=found,
        fix=f"{fix} {again}".strip(),
    )


def reason(error: OSError) -> str:
    """Say why, as the system does."""
    return error.strerror or str(error) or type(error).__name__


def near_paths(path: Path) -> str:
    """Make a hint that names the paths most like one that is not there, or the first of its folders that is not."""
    for folder in (path, *path.parents):
        try:
            names = [entry.name for entry in folder.parent.iterdir()]
        except (OSError, ValueError):  # or a path that no folder can hold
            continue
        hint = nearest(folder.name, names) if folder.name not in names else ""
        return hint.replace(NEAREST, f"Nearest in {folder.parent}:") if hint else ""
    return ""


def free_bytes(path: Path) -> int | None:
    """Return how many bytes there is room for where `path` is, or is to be; None where the system does not say."""
    for place in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def write_whole(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    nbytes: int = 0,
    *,
    again: str = "",
    sync: bool = True,
) -> None:
    """Write a file that is there, with all of its bytes on the disk, or not at all.

    chunks: its bytes.  nbytes: how many they are, as far as that is known.  again: what a further try would do.
    sync: False where whoever reads the file finds for himself that bytes are missing: they are then written later.
    Raises ConfigError as `cannot_write` makes it, and what `chunks` raises; nothing is left then, not even a part.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    done = 0
    try:
        # What making a chunk raises is no error of this file's.
        with writing(path, nbytes, again=again):
            out = open(temporary, "wb")  # noqa: SIM115
        try:
            for chunk in chunks:
                with writing(path, max(nbytes, done + len(chunk)), again=again):
                    out.write(chunk)
                done += len(chunk)
            with writing(path, max(nbytes, done), again=again):
                out.flush()
                if sync:
                    os.fsync(out.fileno())
        finally:
            # What is still to be written would fail again.
            with contextlib.suppress(OSError):
                out.close()
        with writing(path, again=again):
            os.replace(temporary, path)
            if sync:
                sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
