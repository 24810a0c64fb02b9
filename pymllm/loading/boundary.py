"""The last resort of reading a checkpoint: what no check has foreseen becomes one error that says so."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from pymllm.errors import CheckpointError, ConfigError, PymllmError
from pymllm.weights.memory import is_out_of_memory

PACKAGE = Path(__file__).parents[1]


@contextlib.contextmanager
def reading_checkpoint(file: Path, *, counted: bool = False) -> Iterator[None]:
    """Turn an exception that nobody has foreseen into a CheckpointError "unforeseen" with the exception as its cause.

    Such is a fault of pymllm's as well as of the file: the error names the place, and asks for a report.  An error of
    the machine, or of whoever interrupts, stays what it is; want of memory becomes "out-of-memory".
    file: of the settings, for an error that does not name its file as it lies on the disk.
    counted: whether it is known by now what the tensors take: want of memory stays what it is, too, and its caller says
    how much was wanted.
    """
    try:
        yield
    except PymllmError as error:
        if isinstance(error, ConfigError) and error.file == "config.json":
            error.file = str(file)
            error.args = (str(error),)
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise _unforeseen(file, error) from error
        if counted:
            raise
        raise CheckpointError(
            "there is not enough memory to read this checkpoint",
            code="out-of-memory",
            file=str(file),
            found=" ".join(str(error).split())[:200] or None,
            fix="`pymllm plan` shows what it takes; if its config claims sizes that it has not, it is damaged.",
        ) from error
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise _unforeseen(file, error) from error


def _unforeseen(file: Path, error: Exception) -> CheckpointError:
    frames = traceback.extract_tb(error.__traceback__)
    ours = next((frame for frame in reversed(frames) if PACKAGE in Path(frame.filename).parents), None)
    place = "" if ours is None else f", at {Path(ours.filename).relative_to(PACKAGE)}:{ours.lineno}"
    said = " ".join(str(error).split())[:200]
    return CheckpointError(
        "the checkpoint cannot be read, for a reason that pymllm does not foresee",
        code="unforeseen",
        file=str(file),
        found=f"{type(error).__name__}: {said}{place}",
        fix="Look for a wrong setting in that file; and report this, with the file: pymllm should have named it.",
    )
