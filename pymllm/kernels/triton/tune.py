"""Finding the fastest tiles of the weight-only kernels on the GPU that is here, for `pymllm kernels tune`.

A tile that the GPU has too little shared memory or too few registers for is skipped and counted. One whose result is
wrong is reported; a crash ends the search, with the name of its tile. What is found is kept as it is found.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field

import torch

from pymllm.errors import KernelError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton import weight_only
from pymllm.kernels.triton.linear_cases import random_like
from pymllm.kernels.triton.tuning import Tile, architecture_of, bucket
from pymllm.kernels.triton.weight_only import Coding, coding_of, default_tile, shape_key, torch_multiplies
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear

Clock = Callable[[Sequence[Callable[[], object]]], float]
SETS = 8
# Of the largest result: weights are rounded to bfloat16, and float32 sums go in another order.
TOLERANCE = 2e-2
# What Triton and the driver say of kernels that a GPU cannot build or launch, where they raise a plain RuntimeError.
TOO_LARGE = ("PassManager::run failed", "too many resources", "invalid argument", "invalid configuration")


@dataclass
class Tuned:
    """Findings about one shape's tiles.

    key: the shape's, by which tiles are found.  default: the tile by rule.  seconds: of the tiles that were timed, in
    order.  skipped: how many tiles were not, by reason.  wrong: tiles with wrong results, and by how much.
    """

    key: str
    default: Tile
    seconds: dict[Tile, float] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def best(self) -> Tile:
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        by_rule = self.seconds.get(self.default)
        beside = "not to be built here" if by_rule is None else f"{by_rule * 1e6:.1f} us"
        said = f"{self.key}: {self.seconds[self.best] * 1e6:.1f} us with {self.best} (by rule: {beside}); "
        said += f"{len(self.seconds)} tiles timed"
        return said + "".join(f", {count} {reason}" for reason, count in self.skipped.items())


def candidates(tokens: int, default: Tile) -> Iterator[Tile]:
    """Yield the tiles worth trying for so many rows: the default one, then those that are most like it."""
    sizes = {default.tokens, min(max(bucket(tokens), 16), 64)}
    depths = (default.depth // 2, default.depth, 2 * default.depth)
    # A group of four warps multiplies 64 rows at once: more of them would decode the same weights.
    products = itertools.product(sizes, depths, (1, 2, 4, 8, 16), (1, 2, 3, 4), ((64, 4), (128, 4), (128, 8)))
    others = [Tile(o, rows, depth, s, warps, stages) for rows, depth, s, stages, (o, warps) in products]
    yield default
    yield from sorted(others, key=lambda tile: _distance(tile, default))


def _distance(tile: Tile, other: Tile) -> float:
    """Return by how many doublings two tiles differ."""
    return sum(abs(math.log2(a / b)) for a, b in zip(astuple(tile), astuple(other), strict=True))


def tune(
    kernel: WeightOnlyLinear,
    example: CanonicalWeight,
    out_features: int,
    in_features: int,
    tokens: int,
    device: Device,
    *,
    where: torch.device,
    clock: Clock,
    keep: Callable[[str, Tile], object],
    tiles: Callable[[int, Tile], Iterator[Tile]] = candidates,
    limit: int | None = None,
    deadline: float = math.inf,
    now: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Find the fastest tile for one shape.

    keep: is told a tile that is faster than all before it, unless it is the default one.  limit: how many tiles are
    tried.  deadline: when no other tile is begun, by `now`; one is always tried.
    Raises ValueError for so many tokens that torch multiplies: there is no tile then. Raises KernelError if no tile
    works, or if one crashes.
    """
    if torch_multiplies(tokens):
        raise ValueError(f"{tokens} rows are multiplied by torch, without a tile to tune; tune fewer")
    weights = [random_like(example, out_features, in_features, seed, where) for seed in range(SETS)]
    problem = LinearProblem(weights[0].type, in_features, out_features, torch.bfloat16, device)
    packed = [dict(kernel.pack(weight, problem)) for weight in weights]
    coding: Coding = coding_of(kernel.coding(packed[0], problem))
    words = packed[0]["words"].shape[-1]
    default = default_tile(device, bucket(tokens), out_features, words, coding)
    x = torch.randn(tokens, in_features, device=where, dtype=torch.bfloat16)
    expected = x.float() @ weights[0].dequantize(torch.float32).t()
    del weights
    found = Tuned(shape_key(tokens, out_features, words, coding), default)
    for tile in itertools.islice(dict.fromkeys(tiles(tokens, default)), limit):
        if found.seconds and now() >= deadline:
            found.skipped["left out, as the time was up"] += 1
            continue
        if _shared_bytes(tile, coding) > architecture_of(device).shared_bytes:
            found.skipped["too large for a block's shared memory"] += 1
            continue
        calls = [lambda p=p: kernel.run(p, problem, x, None) for p in packed]  # type: ignore[misc]
        with weight_only.forced_tile(tile):
            try:
                result = calls[0]().float()
                worst = float((result - expected).abs().max() / expected.abs().max())
                if not worst <= TOLERANCE:
                    found.wrong.append(f"{tile} differs by {worst:.3g} of the largest result")
                    continue
                seconds = clock(calls)
            except Exception as error:
                reason = why_not_built(error)
                if reason is None:
                    raise _crashed(found.key, tile, error) from error
                found.skipped[reason] += 1
                continue
        if tile != default and seconds < min(found.seconds.values(), default=math.inf):
            keep(found.key, tile)
        found.seconds[tile] = seconds
    if not found.seconds:
        raise _nothing_works(found)
    return found


def _shared_bytes(tile: Tile, coding: Coding) -> int:
    """Return how much shared memory a tile takes at least: what its stages but one load ahead."""
    if tile.tokens == 1:
        return 0
    return (tile.stages - 1) * tile.depth * (4 * tile.outputs + 2 * coding.per_word * tile.tokens)


def why_not_built(error: Exception) -> str | None:
    """Return why a tile cannot be built or launched on this GPU, or None for an error of another kind."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, OutOfResources):
        return f"out of {error.name}"
    if isinstance(error, (PTXASError, CompilationError)):
        return "not compiled"
    said = str(error).splitlines()[0] if isinstance(error, RuntimeError) and str(error) else ""
    return "not launched" if any(text in said for text in TOO_LARGE) else None


def _crashed(key: str, tile: Tile, error: Exception) -> KernelError:
    return KernelError(
        f"a tile of {key} crashed: {type(error).__name__}: {error}",
        code="tile-crashed",
        expected="a result, or a tile that the GPU refuses",
        found=str(tile),
        fix="What was found before is kept. Tune other shapes with --shape and --tokens; the tile is a bug of ours.",
    )


def _nothing_works(found: Tuned) -> KernelError:
    why = [f"{count} {reason}" for reason, count in found.skipped.items()] + found.wrong
    return KernelError(
        f"no tile of {found.key} works on this GPU",
        code="no-tile",
        expected="one tile that is built, launched and right",
        found="; ".join(why) or "no tile to try",
        fix="Run this layer with other kernels: --kernel linear=torch, or another format.",
    )
