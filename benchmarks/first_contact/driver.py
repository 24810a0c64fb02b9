"""Runs the stages one group after another, each within its share of the time, whatever becomes of its processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compiler import choose_compiler
from .notes import Task
from .part import Part
from .results import Results
from .stages import Stage
from .summary import is_wrong, write_summary

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.05
FOR_THE_END = 4  # seconds kept for ending processes, and for the summary
AGAIN_SECONDS = 2  # a second Ctrl+C within them ends everything
LEAST = 3  # seconds with which a stage is worth beginning


class Ended(Exception):
    """A signal that ends the whole run.  status: the exit status."""

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Settings:
    """What was asked for.  seconds: of everything.  cpus: None: those that this process may use."""

    seconds: float
    out: Path
    work: Path
    rehearse: bool = False
    cpus: int | None = None

    @property
    def processors(self) -> int:
        return self.cpus or len(os.sched_getaffinity(0))


def run(groups: Sequence[Sequence[Stage]], settings: Settings) -> int:
    """Run the stages; print and write what they found.

    Returns the exit status: 0 where nothing is wrong, 1 where something is, 2 where nothing can run here, and 128 and a
    signal's number where that ended the run.
    """
    results = Results(settings.out)
    titles: dict[str, str] = {}
    ends_at = time.monotonic() + settings.seconds - FOR_THE_END
    status: int | None = None
    with _signals(), tempfile.TemporaryDirectory(prefix="run-", dir=settings.work) as scratch:
        environment = _environment(settings)
        try:
            for index, group in enumerate(groups):
                rest = sum(max(stage.share for stage in later) for later in groups[index:])
                left = ends_at - time.monotonic()
                seconds = left * max(stage.share for stage in group) / rest
                titles |= {stage.name: stage.title for stage in group}
                if left < LEAST:
                    for stage in group:
                        results.take(stage.name, {"item": "all of it", "ok": None, "why": "the time was up"})
                    continue
                _run_group(group, seconds, settings, environment, results, Path(scratch))
                if any(row.get("fatal") for row in results.rows):
                    break
        except Ended as end:
            results.take("run", {"item": "the rest", "ok": None, "why": str(end)})
            status = end.status
        except KeyboardInterrupt:
            results.take("run", {"item": "the rest", "ok": None, "why": "Ctrl+C"})
            status = 128 + signal.SIGINT
    fatal = next((row["fatal"] for row in results.rows if row.get("fatal")), None)
    if fatal is not None:
        results.conclude(fatal)
        return 2
    results.say("the end")
    results.conclude(write_summary(results.rows, titles, str(settings.out), rehearsal=settings.rehearse))
    return status if status is not None else int(is_wrong(results.rows))


def _run_group(
    group: Sequence[Stage],
    seconds: float,
    settings: Settings,
    environment: dict[str, str],
    results: Results,
    scratch: Path,
) -> None:
    """Run the stages of a group side by side.  Ctrl+C ends them, and another soon after it everything."""
    ends_at = time.monotonic() + seconds
    counts = {stage: stage.parts(settings.processors) for stage in group}
    names = ", ".join(
        f"{stage.name} ({count} processes)" if count > 1 else stage.name for stage, count in counts.items()
    )
    results.say(f"{names}: {seconds:.0f} s at most")
    threads = max(1, settings.processors // sum(counts.values()))
    environment = {"OMP_NUM_THREADS": str(threads), **environment}
    running: list[Part] = []
    try:
        for stage, count in counts.items():
            for number in range(count):
                stem = str(scratch / f"{stage.name}-{number}")
                task = Task(
                    *(stage.name, f"{stem}.notes", f"{stem}.done", number, count, ends_at, seconds),
                    *(settings.rehearse, str(settings.out), str(scratch)),
                )

                def tell(row: dict[str, Any], stage: Stage = stage) -> None:
                    results.take(stage.name, row)

                running.append(Part(stage, task, environment, ROOT, tell))
        while running:
            running = [part for part in running if part.poll()]
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        while running:
            running.pop().stop("Ctrl+C ended the stage")
        results.say(f"Ctrl+C ended {names}; again within {AGAIN_SECONDS} s ends everything")
        time.sleep(AGAIN_SECONDS)  # a second one goes up to `run`
    finally:
        for part in running:
            with contextlib.suppress(OSError):
                part.stop("the run was ended")


def _environment(settings: Settings) -> dict[str, str]:
    """The variables of all processes: this clone first, no network, compiled kernels kept."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}
    variables.setdefault("TRITON_CACHE_DIR", str(settings.work / "triton"))
    if settings.rehearse:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    else:
        variables.pop("TRITON_INTERPRET", None)
    compiler = choose_compiler(settings.work)
    if compiler.variable is not None:
        variables["CC"] = compiler.variable
    return variables


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the run as an exception, so that its processes end with it."""

    def end(number: int, frame: object) -> None:
        raise Ended(f"{signal.Signals(number).name} ended the run", 128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    # Who started this may have it ignore Ctrl+C, as shells do of what runs in the background.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove_leftovers(work: Path) -> None:
    """Remove what runs that were killed have left in the folder of work."""
    for folder in work.glob("run-*"):
        shutil.rmtree(folder, ignore_errors=True)
