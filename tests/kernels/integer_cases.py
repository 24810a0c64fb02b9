"""What tests of the native integer kernels share: activations, and how far from float64 a result may be."""

import pytest
import torch

from pymllm.kernels.native import extension

needs_native = pytest.mark.skipif(
    not extension.native_available(), reason=str(extension.native_missing_reason())
)

PATHS = extension.probe().runnable_paths
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
HALF_UNIT = {
    torch.float32: 2**-24,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-8,
}  # of the last place, relative


def assert_close(y, x, weight, bias, *, exact: bool, within: float = 0.0) -> None:
    """Within the bounds that follow from how the kernel rounds; none is statistical.

    An activation is off by at most half a code. int8: a code is the group's largest |x| / 127. Exact: the scale is a
    power of two, so the largest |x| is 63.5 codes or more, and each further slice divides a code by 254; two slices
    for 16-bit floats, three for float32. Then every group's sum is rounded a few times to float32, and y to its dtype.
    within: what else the sums may be off by, of Σ|x| times the row's largest |w|: float offsets are rounded apart.
    """
    x64, weight64 = x.double(), weight.dequantize(torch.float64)
    expected = x64 @ weight64.T + (0 if bias is None else bias.double())
    group = min(weight.group_size, 128)
    if weight.group_size < x.shape[-1]:
        group = next(size for size in (128, 64, 32, 16) if weight.group_size % size == 0)
    elif x.shape[-1] % group:
        group = 128  # a row filled up: at most blocks of 128
    padded = torch.nn.functional.pad(x64, (0, -x.shape[-1] % group))
    largest = padded.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True)
    groups = largest.shape[-2]
    spread = largest.expand(*largest.shape[:-1], group).flatten(-2)[..., : x.shape[-1]]
    magnitude = spread @ weight64.abs().T
    slices = 1 if not exact else 3 if x.dtype is torch.float32 else 2
    half_code = 0.5 / 127 if slices == 1 else 0.5 / 63.5 / 254 ** (slices - 1)
    bound = magnitude * (1.001 * half_code + (groups + 8) * 2**-24)
    bound += within * spread.sum(-1, keepdim=True) * weight64.abs().amax(1)
    # float16 has a smallest step of 2^-24; float32 sums add the bias before y is rounded.
    bound += (
        expected.abs() * (HALF_UNIT[y.dtype] + 2**-22)
        + 2**-24
        + (0 if bias is None else bias.double().abs() * 2**-22)
    )
    error = (y.double() - expected).abs()
    assert y.shape == expected.shape
    assert bool((error <= bound).all()), f"error is {(error / bound).max().item():.3g} times its bound"


def relative_error(y, x, weight) -> float:
    expected = x.double() @ weight.dequantize(torch.float64).T
    return ((y.double() - expected).norm() / expected.norm()).item()
