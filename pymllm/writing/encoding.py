"""From floats to weights that a spelling can store: the target method's own rounding, then what storing it takes."""

# O out_features, I in_features, G group_size

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pymllm.errors import CheckpointError
from pymllm.kernels.canonical import (
    E4M3_MAX,
    CanonicalWeight,
    DenseWeight,
    Fp8Weight,
    IntWeight,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape


def encode(
    target: LinearMethodBase, floats: Tensor, shape: LinearShape, scale_dtype: torch.dtype | None
) -> CanonicalWeight:
    """Quantise a weight so that files can hold it: with integer zero points, and scales exact in `scale_dtype`.

    scale_dtype: None: files hold weights as the method makes them.
    target: the method that rounds.  floats: [O, I] float32.  Returns `target`'s weight.
    CheckpointError where a float dtype overflows.
    """
    return fitted(target.quantize(floats, shape), floats, scale_dtype)


def fitted(made: CanonicalWeight, floats: Tensor, scale_dtype: torch.dtype | None) -> CanonicalWeight:
    """Change a newly made weight of `floats` [O, I] so that files can hold it; see `encode`."""
    if isinstance(made, IntWeight) and scale_dtype is not None:
        return storable_integers(made, floats, scale_dtype)
    if isinstance(made, Fp8Weight) and scale_dtype is not None:
        return storable_fp8(made, floats, scale_dtype)
    if isinstance(made, DenseWeight) and not bool(torch.isfinite(made.weight).all()):
        raise CheckpointError(
            f"a weight is too large for {str(made.weight.dtype).removeprefix('torch.')}",
            code="bad-weight",
            found=f"a magnitude of {float(floats.abs().max()):.3g}",
        )
    return made


def storable_integers(weight: IntWeight, floats: Tensor, scale_dtype: torch.dtype) -> IntWeight:
    """Give a weight integer zero points, and scales in `scale_dtype`; codes are chosen anew where that changes them.

    floats: [O, I], what the codes stand for.
    """
    scales, zeros = weight.scales, weight.zeros
    if weight.offsets is not None:
        zeros = (
            (-weight.offsets.float() / scales.float()).round().clamp(0, 2**weight.bits - 1).to(torch.uint8)
        )
    if scale_dtype is not scales.dtype:
        scales = scales.to(scale_dtype)
    same = weight.offsets is None and torch.equal(scales.float(), weight.scales.float())
    changed = replace(weight, scales=scales, zeros=zeros, offsets=None)
    return changed if same else recoded(changed, floats)


def storable_fp8(weight: Fp8Weight, floats: Tensor, scale_dtype: torch.dtype) -> Fp8Weight:
    """Give a weight scales that are exact in `scale_dtype`, as readers that load all in the model's dtype round them.

    Where that dtype would change a scale by more than a hundredth (float16 has few bits below 2^-14), they stay.
    """
    scales = weight.scales.to(scale_dtype).float()
    if not bool(((scales - weight.scales).abs() <= 0.01 * weight.scales).all()):
        return weight
    changed = replace(weight, scales=scales)
    codes = (floats / changed.expanded_scales()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return replace(changed, weight=codes)


def recoded(weight: IntWeight, floats: Tensor) -> IntWeight:
    """Keep the scales and zero points, and choose the codes nearest to `floats` [O, I].  Groups must lie in order."""
    groups = floats.float().unflatten(1, (-1, weight.group_size))  # [O, I/G, G]
    middle = 2 ** (weight.bits - 1)
    zeros = middle if weight.zeros is None else weight.zeros.float().unsqueeze(-1)
    codes = (groups / weight.scales.float().unsqueeze(-1)).round() + zeros
    return replace(weight, codes=codes.clamp(0, 2**weight.bits - 1).to(torch.uint8).flatten(1))
