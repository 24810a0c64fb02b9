"""A bounded, seeded run over one kind of input: Hypothesis makes inputs and shrinks what fails, a child judges."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from .children import Child, Verdict, save
from .inputs import Input, Kind
from .kinds import KINDS

# Inputs between two looks at the clock and at what was found.
BATCH = 100


class Found(Exception):
    """An input that no reader may answer so."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


@dataclass
class Tally:
    """What became of one kind's inputs.

    classes: how many ended in each way, by the meaning of the change and the verdict's name.
    codes: how many were refused with each code.  found: the findings, one a signature, the smallest input each.
    """

    kind: str
    inputs: int = 0
    seconds: float = 0.0
    classes: Counter[tuple[str, str]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    found: dict[str, Path] = field(default_factory=dict)


def run(
    kind: Kind,
    seed: int,
    keep: Path,
    *,
    seconds: float | None = None,
    inputs: int | None = None,
    tell: Callable[[str], None] = print,
) -> Tally:
    """Judge inputs until the time is over, or so many were judged.

    keep: where findings are written, a folder each.  A finding is shrunk, written, and then no longer looked for.
    """
    tally, child = Tally(kind.name), Child(kind)
    started = time.monotonic()
    batch = 0

    def left() -> bool:
        within = seconds is None or time.monotonic() - started < seconds
        return within and (inputs is None or tally.inputs < inputs)

    smallest: dict[str, tuple[Input, Verdict]] = {}

    def judge(one: Input) -> None:
        # Once the time is over, the rest of a batch passes unseen, and no shrinking goes on.
        if not left():
            return
        verdict = child.judge(one)
        tally.inputs += 1
        tally.classes[one.meaning, verdict.name] += 1
        if verdict.name == "refused":
            tally.codes[verdict.detail] += 1
        if not verdict.bad(one):
            return
        signature = _signature(one, verdict)
        if signature in tally.found:
            return
        known = smallest.get(signature)
        if known is None or _size(one) <= _size(known[0]):
            smallest[signature] = one, verdict
        # To make a hang smaller would take a limit of time a step.
        if verdict.name == "hang":
            note()
        else:
            raise Found(verdict)

    def note() -> None:
        for signature, (one, verdict) in smallest.items():
            folder = save(keep / f"{kind.name}-{len(tally.found)}", kind, one, verdict)
            tally.found[signature] = folder
            tell(f"{kind.name}: {verdict}\n  {one.subject}: {one.changed}\n  {folder}")
        smallest.clear()

    try:
        while left():
            batch += 1
            check = given(kind.inputs())(judge)
            check = settings(
                max_examples=BATCH,
                database=None,
                deadline=None,
                derandomize=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
                report_multiple_bugs=False,
            )(check)
            try:
                seeded(seed * 1_000_003 + batch)(check)()
            except Exception:
                # Found, or Hypothesis' own word that a finding does not come again; what it was is kept here.
                if not smallest:
                    raise
            note()
    finally:
        child.stop()
        tally.seconds = time.monotonic() - started
    return tally


def _signature(one: Input, verdict: Verdict) -> str:
    """Return what makes two findings one: how it ended, and where; of another answer, which place was changed."""
    if verdict.name == "different":
        return f"different {one.subject} {re.sub(r' by [^;]*|[0-9]+', '', one.changed)}"
    place = verdict.detail.partition(": ")[0]
    return f"{verdict.name} {place if verdict.name in ('foreign', 'memory') else one.subject}"


def _size(one: Input) -> int:
    return sum(map(len, one.files.values()))


def run_by_name(name: str, seed: int, keep: Path, seconds: float | None, inputs: int | None) -> Tally:
    """Prepare a kind in this process and run it.  Arguments as for `run`."""
    torch.set_num_threads(1)
    kind = KINDS[name]()
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        # A child that is ended leaves its folders: they go with this one.
        tempfile.tempdir = folder
        kind.prepare(Path(folder))
        return run(
            kind, seed, keep, seconds=seconds, inputs=inputs, tell=lambda text: print(text, flush=True)
        )
