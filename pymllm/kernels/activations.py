"""Activations rounded as a checkpoint asks for it, which compute="checkpoint" honours.

Each function returns x as its codes and scales say it. The kinds:

    token, tensor, static, group   the weight's own kind of codes (int8, fp8, fp4), symmetric: a scale for each row, for
                                   all of x, the checkpoint's, or for each group of inputs of a row
    token asym, tensor asym,       int8 codes with a zero point
    static asym
    token fp8, static fp8          e4m3 codes beside weights of another kind, scaled by row or by the checkpoint
    group mx                       e4m3 codes in groups of 32 whose scales are powers of two
    token product, tensor product, int8 codes with the scale of x's dtype, multiplied as integers and scaled afterwards
    token product asym
    token asym reciprocal          as token asym, but x times 1/scale is rounded before the zero point is added

The last four are torchao's. All are computed in x's dtype, as the checkpoints' writers do it: for bfloat16 activations
a scale in float32 moves so many codes that the logits end up twice as far from those of the writer.
"""

# O out_features, I in_features, P parts of a fused layer

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX, CodebookType, Fp8Type, IntType, IntWeight, to_e4m3

MX_GROUP = 32


def quantise_activations(
    x: Tensor,
    kind: Fp8Type | IntType | CodebookType,
    input_scales: Tensor | None,
    input_zeros: Tensor | None = None,
) -> Tensor:
    """Round x, [*, I], to codes of the weight type's kind of activations.  Returns their values, in x's dtype.

    input_scales: [P], one for each part of the layer; the largest is used, which overflows in no part.
    input_zeros: [P], for "static asym"; layers with such parts are never fused, so that P is 1.
    """
    if kind.activations == "group mx":
        return quantise_to_mxfp8(x)
    if isinstance(kind, CodebookType) and not kind.activations.endswith(" fp8"):
        return quantise_to_fp4(x, kind.group_size, input_scales)
    how, _, more = kind.activations.partition(" ")
    if more.startswith("asym"):
        return _quantise_asymmetrically(x, kind.activations, input_scales, input_zeros)
    to_fp8 = kind.family == "fp8" or more == "fp8"
    # int8 codes reach from -128 to 127; 127.5 is halfway between the two magnitudes.
    largest = E4M3_MAX if to_fp8 else 127.5
    side = (kind.block[1] if isinstance(kind, Fp8Type) else kind.group_size) or x.shape[-1]
    if how == "static":
        assert input_scales is not None
        scale = input_scales.max().to(x.dtype)
    elif how == "tensor":
        scale = x.abs().amax() / largest if x.numel() else x.new_ones(())
    elif how == "group":
        padded = F.pad(x, (0, -x.shape[-1] % side)).unflatten(-1, (-1, side))
        scale = (padded.abs().amax(-1) / largest).repeat_interleave(side, dim=-1)[..., : x.shape[-1]]
    else:
        scale = x.abs().amax(-1, keepdim=True) / largest
    scale = scale.clamp(min=torch.finfo(x.dtype).smallest_normal)
    if to_fp8:
        codes = to_e4m3(x / scale).to(x.dtype)
    else:
        codes = (x / scale).round().clamp(-128, 127)
    return codes * scale


def _quantise_asymmetrically(
    x: Tensor, activations: str, scales: Tensor | None, zeros: Tensor | None
) -> Tensor:
    """Round x to int8 codes, one of which means zero exactly."""
    if activations == "static asym":
        assert scales is not None and zeros is not None
        scale, zero = scales.max().to(x.dtype), zeros.reshape(-1)[0].to(x.dtype)
    else:
        scale, zero = asymmetric_scale(x, per_row=activations != "tensor asym")
    if activations == "token asym reciprocal":
        codes = (x * (1 / scale)).round() + zero
    else:
        codes = (x / scale + zero).round()
    return (codes.clamp(-128, 127) - zero) * scale


def asymmetric_scale(x: Tensor, *, per_row: bool) -> tuple[Tensor, Tensor]:
    """Compute the scale and zero point that spread int8 codes over the range of x, which is widened to hold 0.

    per_row: for each row of x, else for all of x.  Returns both in x's dtype.
    """
    if not x.numel():
        return x.new_ones(()), x.new_zeros(())
    low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if per_row else (x.amin(), x.amax())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).smallest_normal)
    return scale, (-128 - low / scale).clamp(-128, 127).round()


def integer_product(x: Tensor, weight: IntWeight) -> Tensor:
    """Multiply x, [*, I], by weight.T for the "product" kinds of activations.

    weight: symmetric, with one scale for each row.  Returns [*, O] in x's dtype.
    """
    how, _, more = weight.activations.partition(" ")
    if more == "product asym":
        scale, zero = asymmetric_scale(x, per_row=how == "token")
    elif how == "token":
        scale, zero = x.abs().amax(-1, keepdim=True) / 127.5, None
    else:
        scale, zero = (x.abs().amax() if x.numel() else x.new_ones(())) / 127.5, None
    scale = scale.float().clamp(min=torch.finfo(torch.float32).eps)
    codes = x.float() * (1 / scale)
    codes = (codes.round() + (0 if zero is None else zero.float())).clamp(-128, 127)
    rows = weight.codes.float() - 2 ** (weight.bits - 1)
    product = (F.linear(codes, rows) * scale).to(x.dtype)
    if zero is not None:
        product = product - (zero.float() * scale * rows.sum(-1)).to(x.dtype)
    return (product * weight.scales.float().flatten()).to(x.dtype)


def quantise_to_fp4(x: Tensor, group_size: int, global_scales: Tensor | None) -> Tensor:
    """Round x, [*, I], to e2m1 in groups of inputs.  Returns the values, in x's dtype.

    global_scales: [P], nvfp4's: a group's scale is e4m3 divided by a global one (the smallest of the parts', which
    overflows in no part). None: mxfp4's powers of two, the next one up where the largest value would round past 6.
    """
    groups = F.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))
    peak = groups.abs().amax(-1, keepdim=True)
    if global_scales is not None:
        over = global_scales.min()
        stored = ((peak / 6).float() * over).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        scale = torch.where(stored == 0, 0.125, stored) / over
    else:
        scale = power_of_two_scale(peak, 2)
    rounded = nearest_e2m1(groups.float() / scale) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def quantise_to_mxfp8(x: Tensor) -> Tensor:
    """Round x, [*, I], to e4m3 in groups of 32 inputs with power-of-two scales.  Returns the values, in x's dtype."""
    groups = F.pad(x, (0, -x.shape[-1] % MX_GROUP)).unflatten(-1, (-1, MX_GROUP))
    scale = power_of_two_scale(groups.abs().amax(-1, keepdim=True), 8)
    codes = to_e4m3(groups.float() / scale).float()
    return (codes * scale).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def power_of_two_scale(peak: Tensor, exponent: int) -> Tensor:
    """Find the power of two which `peak` is divided by to lie in the binade of 2**exponent.

    From 1.75 times the binade's start on it is the next power of two.
    """
    mantissa, found = torch.frexp(peak.float())  # peak = mantissa * 2**found, mantissa in [0.5, 1)
    power = found - 1 + (mantissa >= 0.875).int() - exponent
    return torch.ldexp(torch.ones_like(mantissa), power.clamp(-126, 127))


def nearest_e2m1(values: Tensor) -> Tensor:
    """Round each value to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even codes."""
    size = values.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, values)
