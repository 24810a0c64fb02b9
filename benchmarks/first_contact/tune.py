"""The stage `tune`: the tiles of a few shapes, as `pymllm kernels tune` measures them, within the stage's time.

They are written to tiles.json in the folder of results, not to the file that kernels read; docs/gpu.md, "Tiles".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pymllm.kernels.registry import kernels_for
from pymllm.kernels.triton.timing import seconds_each
from pymllm.kernels.triton.tune import candidates, tune
from pymllm.kernels.triton.tuning import Tile, device_file, write_tuned

from .notes import Notes
from .place import Place

KERNELS = ("triton_int", "triton_fp8")
SHAPES, TOKENS = ((4096, 4096), (6144, 4096)), (1, 16)


def run(notes: Notes) -> None:
    place = Place(notes.task.rehearse)
    kernels = {kernel.name: kernel for kernel in kernels_for("linear") if kernel.name in KERNELS}
    shapes: tuple[tuple[int, int], ...] = SHAPES
    if place.rehearse:
        shapes = ((128, 256),)
    asked = [(name, shape, tokens) for shape in shapes for tokens in TOKENS for name in KERNELS]
    if place.rehearse:
        asked = asked[:1]
    for number, (name, shape, tokens) in enumerate(asked):
        ends_at = time.monotonic() + (notes.task.left - 1) / (len(asked) - number)
        kernel = kernels[name]
        notes.run(
            f"{name}, {tokens} x {shape[0]} x {shape[1]}",
            lambda kernel=kernel, shape=shape, tokens=tokens, ends_at=ends_at: measure(  # type: ignore[misc]
                kernel, shape, tokens, ends_at, place, Path(notes.task.out)
            ),
        )


def measure(
    kernel: Any, shape: tuple[int, int], tokens: int, ends_at: float, place: Place, out: Path
) -> dict[str, Any]:
    """Find the best of the tiles that are tried until `ends_at`, the default one in any case."""
    tried = 0

    def in_time(tokens: int, default: Tile) -> Iterator[Tile]:
        nonlocal tried
        for tile in _spread(list(candidates(tokens, default))):
            if (tried and time.monotonic() > ends_at) or (tried > 1 and place.rehearse):
                return
            tried += 1
            yield tile

    key, tile, seconds, by_rule = tune(
        kernel,
        kernel.examples()[0],
        *shape,
        tokens,
        place.device,
        where=place.torch_device,
        clock=_wall_clock if place.rehearse else seconds_each,
        tiles=in_time,
    )
    write_tuned(out / "tiles.json", {key: tile}, place.device)
    micros, rule = seconds * 1e6, by_rule * 1e6
    return {
        **{"key": key, "tried": tried, "microseconds": round(micros, 1), "by_rule": round(rule, 1)},
        "say": f"{key}: {micros:.1f} us with {tile}, {rule:.1f} by rule, {tried} tried"
        + (
            ""
            if place.rehearse
            else f"; to use: pymllm/kernels/triton/configs/{device_file(place.device).name}"
        ),
    }


def _spread(tiles: Sequence[Tile]) -> Iterator[Tile]:
    """The first tile, then the others far from each other first, so that few of them tell much."""
    first, rest = tiles[0], tiles[1:]
    yield first
    step = next(step for step in (37, 31, 29, 23, 1) if len(rest) % step or len(rest) <= step or step == 1)
    for index in range(len(rest)):
        yield rest[index * step % len(rest)]


def _wall_clock(calls: Sequence[Callable[[], object]]) -> float:
    """For a rehearsal: the time of one call in the interpreter, which says nothing of a GPU."""
    started = time.perf_counter()
    calls[0]()
    return time.perf_counter() - started
