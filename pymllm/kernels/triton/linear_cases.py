"""The cases that linear kernels are compiled for ahead of time: weights of models' sizes, and batches of all sizes."""

# O out_features, I in_features, T tokens

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import Compute
from pymllm.kernels.triton.ahead_of_time import Case

EVEN, ODD = (4096, 14336), (1000, 960)  # (O, I): divided by every tile, and by none
TOKENS = (1, 16, 64, 200, 2048)
# Rows that a step of decoding may have. Beyond them, spilled registers cost little of the whole.
DECODED = 64


def resized(weight: Any, out_features: int, in_features: int) -> Any:
    """Make a weight like this one, of another shape, on meta."""
    sizes, old = (out_features, in_features), weight.shape
    fields = dict(vars(weight))
    if fields.get("group_size") == old[1]:
        fields["group_size"] = in_features
    for name, value in fields.items():
        if isinstance(value, Tensor) and name != "table":
            # One scale for an axis stays one.
            shape = [
                1 if n == 1 else -(-n * new // was)
                for n, new, was in zip(value.shape, sizes, old, strict=False)
            ]
            fields[name] = torch.empty(shape, dtype=value.dtype, device="meta")
    return type(weight)(**fields)


def random_like(weight: Any, out_features: int, in_features: int, seed: int, where: torch.device) -> Any:
    """Make a weight like one on meta, of another shape, with random codes and scales of about 1/64."""
    generator = torch.Generator().manual_seed(seed)
    fields = dict(vars(resized(weight, out_features, in_features)))
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            continue
        if name == "table":
            fields[name] = value.to(where)
            continue
        if value.dtype.itemsize > 1:
            made = (torch.rand(value.shape, generator=generator) / 64 + 1 / 128).to(value.dtype)
        elif value.dtype is torch.uint8:
            top = 2 ** getattr(weight, "bits", 4)
            made = torch.randint(0, top, value.shape, generator=generator, dtype=torch.uint8)
        elif value.dtype is torch.float8_e8m0fnu:
            made = torch.randint(118, 122, value.shape, generator=generator, dtype=torch.uint8).view(
                value.dtype
            )
        else:
            made = torch.randn(value.shape, generator=generator).clamp(-4, 4).to(value.dtype)
        fields[name] = made.to(where)
    return type(weight)(**fields)


def linear_cases(
    kernel: Any, device: Device, weights: Sequence[CanonicalWeight], compute: Compute = "auto"
) -> Iterator[Case]:
    """Yield a case for each weight (on meta) and number of tokens, in bfloat16; for the first weight in float16 too."""
    for index, weight in enumerate(weights):
        out_features, in_features = weight.shape
        for dtype in (torch.bfloat16, torch.float16)[: 1 if index else 2]:
            problem = LinearProblem(weight.type, in_features, out_features, dtype, device, compute)
            if kernel.why_not(problem) is not None:
                continue
            packed = kernel.pack(weight, problem)
            for tokens in TOKENS[: len(TOKENS) if dtype is torch.bfloat16 else 2]:
                x = torch.empty((tokens, in_features), dtype=dtype, device="meta")
                name = f"{weight.type}, {str(dtype).removeprefix('torch.')}, {tokens} x {out_features} x {in_features}"
                run = partial(kernel.run, packed, problem, x, None)
                yield Case(name, run, hot=tokens <= DECODED)
