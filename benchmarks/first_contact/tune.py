"""The stage `tune`: the tiles of a few shapes, as `pymllm kernels tune` measures them, within the stage's time.

They are written to tiles.json in the folder of results, not to the file that kernels read; docs/gpu.md, "Tiles".
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pymllm.kernels.registry import kernels_for
from pymllm.kernels.triton.timing import seconds_each
from pymllm.kernels.triton.tune import tune
from pymllm.kernels.triton.tuning import write_tuned

from .notes import Notes, WrongResult
from .place import Place

KERNELS = ("triton_int", "triton_fp8")
SHAPES, TOKENS = ((4096, 4096), (6144, 4096)), (1, 16)  # few: each is made eight times, on the CPU
REHEARSED_TILES = 2


def run(notes: Notes) -> None:
    """Tune every shape, each in its share of the time, those of one token first."""
    place, task = Place(notes.task.rehearse), notes.task
    kernels = {kernel.name: kernel for kernel in kernels_for("linear") if kernel.name in KERNELS}
    asked = list(itertools.product(TOKENS, SHAPES, KERNELS))
    if place.rehearse:
        asked = [(1, (128, 256), KERNELS[0])]
    notes.plan(len(asked))
    for number, (tokens, shape, name) in enumerate(asked):
        deadline = time.monotonic() + (task.left - 1) / (len(asked) - number)
        item = f"{name}, {tokens} x {shape[0]} x {shape[1]}"
        notes.run(item, partial(measure, kernels[name], shape, tokens, deadline, place, Path(task.out)))


def measure(
    kernel: Any, shape: tuple[int, int], tokens: int, deadline: float, place: Place, out: Path
) -> dict[str, Any]:
    """Find the best of the tiles that are tried until the deadline.  WrongResult where one has a wrong result."""
    found = tune(
        kernel,
        kernel.examples()[0],
        *shape,
        tokens,
        place.device,
        where=place.torch_device,
        clock=_wall_clock if place.rehearse else seconds_each,
        keep=lambda key, tile: write_tuned(out / "tiles.json", {key: tile}, place.device),
        limit=REHEARSED_TILES if place.rehearse else None,
        deadline=deadline,
    )
    figures: dict[str, Any] = {"tiles": len(found.seconds), "say": str(found)}
    if found.seconds:
        figures["microseconds"] = round(found.seconds[found.best] * 1e6, 2)
    if found.wrong:
        raise WrongResult(f"{len(found.wrong)} tiles are wrong: {found.wrong[0]}", figures)
    return figures


def _wall_clock(calls: Sequence[Callable[[], object]]) -> float:
    """For a rehearsal: the time of one call in the interpreter, which says nothing of a GPU."""
    started = time.perf_counter()
    calls[0]()
    return time.perf_counter() - started
