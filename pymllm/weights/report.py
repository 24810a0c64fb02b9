"""The load report, which says what became of every tensor of a checkpoint; and the problems that stop a load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from pymllm.errors import LISTED, CheckpointError, first_few, nearest
from pymllm.weights.loader import Slot, same_shape
from pymllm.weights.tensor_file import TensorInfo

Status = Literal["loaded", "tied", "skipped"]


@dataclass(frozen=True)
class TensorRecord:
    """One checkpoint tensor and what became of it.

    nbytes: how many bytes this rank read of it.  reason: why it was tied or skipped.
    """

    name: str
    status: Status
    nbytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Skip:
    """A reason to leave out a tensor of the checkpoint, and the proof that this is harmless.

    refuse: is given what is stored, while loading, and returns why the tensor cannot be left out, or None; None: its
    name alone is proof enough.
    kept: whether it is of a part that is not run, which another checkpoint of the model has all the same.
    """

    reason: str
    refuse: Callable[[Tensor], str | None] | None = None
    kept: bool = False


@dataclass
class LoadReport:
    """The account of one load, filled while loading; `model.load_report` afterwards.

    loaded: the names of the tensors that were read.  methods: how many layers have each method.
    final_bytes: the size of this rank's packed weights.
    taken_from: the file of kept weights that was mapped in place of a load; "": there was none.
    kept_in: the file in which this load's packed weights were kept; "": they were not.
    """

    tensors: list[TensorRecord] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set, repr=False)
    methods: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes_read: int = 0
    final_bytes: int = 0
    taken_from: str = ""
    kept_in: str = ""

    def summary(self) -> str:
        """Sum the report up in one line for a log."""
        counts = Counter(record.status for record in self.tensors)
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        methods = ", ".join(f"{count} x {name}" for name, count in self.methods.most_common())
        if self.taken_from:
            return (
                f"took {self.final_bytes / 1e6:.1f} MB of packed weights in {self.seconds:.2f} s "
                f"from {self.taken_from}; tensors: {states}; methods: {methods}"
            )
        rate = self.bytes_read / 1e9 / self.seconds if self.seconds else 0.0
        return (
            f"loaded {self.bytes_read / 1e6:.1f} MB in {self.seconds:.2f} s ({rate:.2f} GB/s), "
            f"{self.final_bytes / 1e6:.1f} MB packed; tensors: {states}; methods: {methods}"
        )


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a checkpoint.  code: missing, unexpected, shape, dtype, ..."""

    code: str
    tensor: str
    text: str


def raise_problems(file: str, problems: Iterable[Problem]) -> None:
    """Raise ONE CheckpointError for all problems, if there are any.

    Its code is theirs where they agree, else "checkpoint-mismatch".
    """
    found = list(problems)
    if not found:
        return
    if len(found) == 1:
        raise CheckpointError(found[0].text, code=found[0].code, file=file, tensor=found[0].tensor)
    head = f"{len(found)} problems, nothing was loaded:"
    lines: dict[str, list[str]] = {}
    for problem in found:
        lines.setdefault(problem.code, []).append(f"{problem.tensor}: {problem.text}")
    raise CheckpointError(
        LISTED.join([head, *_within(MOST_TEXT, [line for alike in lines.values() for line in alike])]),
        code=found[0].code if len(lines) == 1 else "checkpoint-mismatch",
        file=file,
        tensor=found[0].tensor,
        brief=LISTED.join([head, *(first_few(alike, LISTED) for alike in lines.values())]),
    )


MOST_TEXT = 50_000  # characters of a message; a config alone can claim any number of tensors


def _within(most: int, lines: Sequence[str]) -> list[str]:
    """Return the first lines that have so many characters together, and how many more there are."""
    kept: list[str] = []
    for line in lines:
        most -= len(line)
        if most < 0 and kept:
            return [*kept, f"and {len(lines) - len(kept)} more"]
        kept.append(line)
    return kept


# So many problems get a hint: comparing names is slow, and a checkpoint may have a problem with every tensor.
HINTS = 20


def missing(slot: Slot, stray: Sequence[str]) -> Problem:
    """Describe a slot that no tensor fills.

    stray: the checkpoint's tensors that nothing asks for, among which a misspelt one would be.
    """
    wanted = f"{str(slot.spec.dtype).removeprefix('torch.')} {list(slot.source_shape)}"
    hint = nearest(slot.tensor, stray)
    return Problem("missing", slot.tensor, f"missing; the layer needs it as {wanted}. {hint}".strip())


def mismatch(slot: Slot, tensor: TensorInfo) -> Problem | None:
    """Return why the tensor's dtype or shape does not fit the slot, or None."""
    if tensor.dtype not in slot.spec.dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in slot.spec.dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        return Problem("dtype", tensor.name, f"wrong dtype; expected {expected}, found {found}")
    if not same_shape(tensor.shape, slot.source_shape):
        expected, found = str(list(slot.source_shape)), str(list(tensor.shape))
        return Problem("shape", tensor.name, f"wrong shape; expected {expected}, found {found}")
    return None
