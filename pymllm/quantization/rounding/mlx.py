"""The rounding of `mlx.core.quantize`, step by step, so that codes, scales and biases are equal to its own on a CPU."""

# O out_features, I in_features, G group_size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX, to_e4m3
from pymllm.quantization.storage.packing import E2M1

SMALLEST = 1e-7  # of an affine scale
LARGEST_E2M1 = 6.0
EXPONENT_BIAS = 127  # of e8m0
E8M0 = torch.float8_e8m0fnu


def round_affine(groups: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups [O, I/G, G] to codes of `bits` bits.

    The end that is farther from zero becomes the bias, and zero itself a code: the scale is stretched to make it one.
    A single bit has the two ends as its values.  Codes are chosen before scales and biases become any narrower dtype.
    Returns codes [O, I/G, G] uint8, scales and biases [O, I/G] float32; a scale may be negative.
    """
    values, top = groups.float(), 2**bits - 1
    low, high = values.amin(-1), values.amax(-1)
    scales, biases = ((high - low) / top).clamp(min=SMALLEST), low
    if bits > 1:
        from_low = low.abs() > high.abs()
        scales = torch.where(from_low, scales, -scales)
        edges = torch.where(from_low, low, high)
        steps = (edges / scales).round()
        reached = steps != 0
        scales = torch.where(reached, edges / torch.where(reached, steps, 1.0), scales)
        biases = torch.where(reached, edges, 0.0)
    codes = ((values - biases.unsqueeze(-1)) / scales.unsqueeze(-1)).round().clamp(0, top)
    return codes.to(torch.uint8), scales, biases


def round_e2m1(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round groups [O, I/G, G] to e2m1, in their own dtype as MLX does.

    scale_dtype: e4m3, or e8m0, whose exponent is rounded up, so that no value of a group is cut.
    Returns codes [O, I/G, G] uint8 and scales [O, I/G].
    """
    scales, spread = _round_scales(groups, LARGEST_E2M1, scale_dtype)
    values = groups / spread
    magnitudes = torch.tensor(E2M1[:8], device=values.device)
    # A value halfway goes to the smaller magnitude, and a negative one that becomes zero to plus zero.
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(values.abs().float(), middles)
    negative = (values < 0) & (codes > 0)
    # Under an e4m3 scale of zero, of a group that is too small for any other, all codes are 0.
    codes = torch.where(spread == 0, 0, codes + 8 * negative)
    return codes.to(torch.uint8), scales


def round_e4m3(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Round groups [O, I/G, G] to e4m3 with a power of two each.  Returns codes e4m3 and scales [O, I/G] e8m0."""
    scales, spread = _round_scales(groups, E4M3_MAX, E8M0)
    return to_e4m3((groups / spread).float()), scales


def _round_scales(groups: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose the scales [O, I/G], and return them in `dtype` and, [O, I/G, 1], in that of the groups."""
    peaks = groups.abs().amax(-1).float() / largest
    if dtype is not E8M0:
        scales = to_e4m3(peaks)
        return scales, scales.to(groups.dtype).unsqueeze(-1)
    exponents = torch.where(peaks == 0, 0.0, peaks.log2().ceil()).clamp(-EXPONENT_BIAS, EXPONENT_BIAS)
    stored = (exponents + EXPONENT_BIAS).to(torch.uint8).view(E8M0)
    return stored, torch.exp2(exponents).to(groups.dtype).unsqueeze(-1)
