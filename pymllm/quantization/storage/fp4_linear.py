"""E2M1 linear weights: what NVFP4 and MXFP4 share under all names."""

# I in_features, O out_features, G group_size

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import Activations, CanonicalWeight, CodebookWeight
from pymllm.quantization.storage.packing import E2M1
from pymllm.weights.spec import LinearShape


def e2m1_weight(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor | None = None,
    activations: Activations = "float",
    input_scales: Tensor | None = None,
) -> CodebookWeight:
    """Make the canonical weight of codes [O, I] with scales [O, I/G] and, where there is a second level, of rows [O].

    A rank that holds part of one group has that one group: its size is what the rank holds.
    """
    table, group = torch.tensor(E2M1, device=codes.device), codes.shape[1] // scales.shape[1]
    return CodebookWeight(codes, table, scales, "e2m1", group, row_scales, activations, input_scales)


def fp4_kind(weight: CanonicalWeight) -> Literal["nvfp4", "mxfp4"] | None:
    """Name the layout that a canonical weight is of, by its table, its group size and what its scales are; or None."""
    if not isinstance(weight, CodebookWeight) or weight.codebook != "e2m1":
        return None
    scales, second = weight.scales.dtype, weight.row_scales is not None
    if scales is torch.float8_e4m3fn and second and weight.group_size == 16:
        return "nvfp4"
    return "mxfp4" if scales is torch.float8_e8m0fnu and not second and weight.group_size == 32 else None


def exact_reciprocal(values: Tensor, shape: LinearShape, spelled: str) -> Tensor:
    """Find the float32 numbers whose reciprocals, rounded to float32, are exactly `values`, which are positive.

    spelled: what the numbers are, for the message.  ConfigError if there are none.
    """
    near = values.reciprocal()
    for found in (near, *(torch.nextafter(near, torch.full_like(near, end)) for end in (torch.inf, 0.0))):
        if torch.equal(found.reciprocal(), values):
            return found
    raise ConfigError(
        f"{spelled} is a number to divide by, and none has exactly this weight's scale for its reciprocal",
        code="spelling",
        tensor=shape.name,
        found=f"a scale of {values.flatten()[0].item()!r}",
        fix=f"Write it as modelopt (--format modelopt), or quantise it anew: {shape.name}=nvfp4.",
    )
