"""Finding the fastest tiles of the weight-only kernels on the GPU that is here, for `pymllm kernels tune`."""

# T tokens, O out_features, I in_features

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton import weight_only
from pymllm.kernels.triton.linear_cases import random_like
from pymllm.kernels.triton.tuning import Tile, bucket
from pymllm.kernels.triton.weight_only import Coding, coding_of, default_tile, shape_key
from pymllm.kernels.triton.weight_only_linear import WeightOnlyLinear

Clock = Callable[[Sequence[Callable[[], object]]], float]
SETS = 8


def candidates(tokens: int, default: Tile) -> Iterator[Tile]:
    """Yield the tiles worth trying for so many rows, the default one first."""
    yield default
    sizes = {default.tokens, min(max(bucket(tokens), 16), 64)}
    depths = (default.depth // 2, default.depth, 2 * default.depth)
    for rows, depth, splits, stages in itertools.product(sizes, depths, (1, 2, 4, 8, 16), (1, 2, 3, 4)):
        # A group of four warps multiplies 64 rows at once: more of them would decode the same weights.
        for outputs, warps in ((64, 4), (128, 4), (128, 8)):
            yield Tile(outputs, rows, depth, splits, warps, stages)


def tune(
    kernel: WeightOnlyLinear,
    example: object,
    out_features: int,
    in_features: int,
    tokens: int,
    device: Device,
    *,
    where: torch.device,
    clock: Clock,
    tiles: Callable[[int, Tile], Iterator[Tile]] = candidates,
) -> tuple[str, Tile, float, float]:
    """Find the fastest tile for one shape.

    Returns the shape's key, the tile, its seconds, and those of the default tile.
    A tile counts only if its results are those of the default one, within what float32 sums in another order explain.
    Raises ValueError for so many tokens that torch multiplies: there is no tile then.
    """
    weights = [random_like(example, out_features, in_features, seed, where) for seed in range(SETS)]
    problem = LinearProblem(weights[0].type, in_features, out_features, torch.bfloat16, device)
    packed = [dict(kernel.pack(weight, problem)) for weight in weights]
    coding: Coding = coding_of(kernel.coding(packed[0], problem))
    words = packed[0]["words"].shape[-1]
    default = default_tile(device, bucket(tokens), out_features, words, coding)
    if default is None:
        raise ValueError(f"{tokens} rows are multiplied by torch, without a tile to tune; tune fewer")
    x = torch.randn(tokens, in_features, device=where, dtype=torch.bfloat16)
    expected = None
    timed: list[tuple[float, Tile]] = []
    for tile in dict.fromkeys(tiles(tokens, default)):
        with weight_only.forced_tile(tile):
            try:
                found = kernel.run(packed[0], problem, x, None).float()
                expected = found if expected is None else expected
                if (found - expected).abs().max() <= 2e-2 * expected.abs().max():
                    timed.append((clock([lambda p=p: kernel.run(p, problem, x, None) for p in packed]), tile))  # type: ignore[misc]
            except RuntimeError:  # Triton: more shared memory or registers than there are
                continue
    seconds, best = min(timed, key=lambda pair: pair[0])
    return shape_key(tokens, out_features, words, coding), best, seconds, timed[0][0]
