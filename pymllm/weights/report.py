"""The load report: what became of every tensor of a checkpoint, and of every parameter of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from pymllm.errors import CheckpointError, first_few

Status = Literal["loaded", "tied", "skipped"]


@dataclass(frozen=True)
class TensorRecord:
    """One checkpoint tensor.  reason: why it was tied or skipped.  nbytes: read from the file by this rank."""

    name: str
    status: Status
    nbytes: int = 0
    reason: str = ""


@dataclass
class LoadReport:
    """Filled while loading; `model.load_report` afterwards.

    loaded: the names of those that were read.  methods: how many layers have each method.
    final_bytes: packed weights of this rank.
    """

    tensors: list[TensorRecord] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set, repr=False)
    methods: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes_read: int = 0
    final_bytes: int = 0

    def summary(self) -> str:
        """One line for a log."""
        counts = Counter(record.status for record in self.tensors)
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        methods = ", ".join(f"{count} x {name}" for name, count in self.methods.most_common())
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
    """Raise ONE CheckpointError for all problems; none: return.  Its code is theirs, if they agree."""
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
        "\n  ".join([head, *(line for alike in lines.values() for line in alike)]),
        code=found[0].code if len(lines) == 1 else "checkpoint-mismatch",
        file=file,
        tensor=found[0].tensor,
        brief="\n  ".join([head, *(first_few(alike, "\n  ") for alike in lines.values())]),
    )
