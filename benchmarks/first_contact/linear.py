"""Linear layers of every format that a GPU kernel compiles, for all ways of multiplying, against float64."""

# T tokens, O out_features, I in_features

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import kernels_for, select
from pymllm.kernels.triton.linear_cases import random_like

from .place import Check, Place, Unit

# Rows of decoding, of a bucket, and both sides of each change of kernel; the likeliest first.
TOKENS = (1, 16, 128, 512, 2, 17, 64, 65, 129, 192, 200, 256, 511, 2048)
SQUARE, ODD = (4096, 4096), (1000, 960)


def examples(place: Place) -> dict[str, Any]:
    """Return a weight on meta for each kind that a Triton kernel is compiled for, by the kind's name.

    They are those of the kernels' own cases, so that a new format is checked too.
    """
    found: dict[str, Any] = {}
    for kernel in kernels_for("linear"):
        if getattr(kernel, "device_type", "") != "cuda" or not hasattr(kernel, "cases"):
            continue
        for case in kernel.cases(place.device):
            packed, problem = case.run.args[:2]  # type: ignore[attr-defined]
            if str(problem.weight) not in found:
                found[str(problem.weight)] = kernel.unpack(packed, problem)
    return found


def units(place: Place) -> Iterator[Unit]:
    kinds = list(examples(place).values())
    if place.rehearse:
        plans = [(0.0, torch.bfloat16, (96, 256), (1, 130), kinds[:1] + kinds[5:6])]
    else:
        plans = [
            (0.0, torch.bfloat16, SQUARE, TOKENS, kinds),
            (2.0, torch.float16, SQUARE, TOKENS, kinds),
            (3.0, torch.bfloat16, ODD, TOKENS, kinds),
            (5.0, torch.float16, ODD, TOKENS, kinds),
        ]
    for place_in_order, dtype, shape, tokens, chosen in plans:
        for index, example in enumerate(chosen):
            yield (
                place_in_order + index / 100,
                "linear",
                partial(_checks, place, example, shape, dtype, tokens),
            )


def _checks(
    place: Place, example: Any, shape: tuple[int, int], dtype: torch.dtype, tokens: tuple[int, ...]
) -> Iterator[Check]:
    """Yield a check for each number of rows over one weight, which is made when the first of them runs."""
    (out_features, in_features), where = shape, place.torch_device

    @functools.cache
    def made() -> tuple[Any, Any, dict[str, Tensor], Tensor]:
        weight = random_like(example, out_features, in_features, 0, torch.device("cpu"))
        problem = LinearProblem(weight.type, in_features, out_features, dtype, place.device)
        kernel = select("linear", problem).kernel
        packed = {name: tensor.to(where) for name, tensor in kernel.pack(weight, problem).items()}
        return kernel, problem, packed, weight.dequantize(torch.float64).to(where).t()

    def check(count: int) -> dict[str, Any]:
        kernel, problem, packed, exact = made()
        x = place.randn(count, in_features, seed=count, dtype=dtype)
        bias = place.randn(out_features, seed=1, dtype=dtype)
        kind = problem.weight
        seen = x
        if getattr(kind, "activations", "float") != "float":
            seen = quantise_activations(x, kind, packed.get("input_scales"))
        expected = seen.double() @ exact + bias.double()
        return {"kernel": kernel.name, **place.compare(kernel.run(packed, problem, x, bias), expected)}

    title = f"{example.type}, {str(dtype).removeprefix('torch.')}"
    for count in tokens:
        yield f"{title}, {count} x {out_features} x {in_features}", partial(check, count)
