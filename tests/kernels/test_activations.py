"""Rounded activations against each value's own arithmetic, one by one, in the dtype that the writer computes in."""

# T tokens, O out_features, I in_features

import math

import numpy as np
import pytest
import torch

from pymllm.kernels.activations import integer_product, quantise_activations
from pymllm.kernels.canonical import Fp8Type, IntType, IntWeight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.registry import kernels_for


def values(rows=4, columns=64):
    x = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
        * torch.logspace(-2, 2, rows)[:, None]
    )
    x[0] = x[0].abs() + 1  # no negative value: zero must still be a code
    return x


def int8(activations):
    return IntType(8, 64, True, activations=activations)


def half_even(value):
    return float(np.round(value))


@pytest.mark.parametrize("per_row", (True, False))
def test_asymmetric_codes_span_minimum_to_maximum_and_keep_zero(per_row):
    x = values()
    got = quantise_activations(x, int8("token asym" if per_row else "tensor asym"), None)
    for row in range(x.shape[0]):
        among = x[row] if per_row else x
        low, high = min(float(among.min()), 0.0), max(float(among.max()), 0.0)
        scale = np.float32(np.float32(high - low) / np.float32(255))
        zero = np.float32(half_even(min(max(np.float32(-128) - np.float32(low) / scale, -128), 127)))
        for found, value in zip(got[row].tolist(), x[row].tolist(), strict=True):
            code = min(max(half_even(np.float32(value) / scale + zero), -128), 127)
            assert found == pytest.approx(float((np.float32(code) - zero) * scale), rel=1e-6, abs=1e-9)
    assert (got - x).abs().max() <= (x.max() - x.min()) / 255  # a step
    assert torch.equal(quantise_activations(torch.zeros(2, 64), int8("token asym"), None), torch.zeros(2, 64))


def test_static_asymmetric_codes_use_the_checkpoints_scale_and_zero_point():
    x = values()
    got = quantise_activations(
        x, int8("static asym"), torch.tensor([0.5]), torch.tensor([-30], dtype=torch.int8)
    )
    expected = ((x / 0.5).round() - 30).clamp(-128, 127)
    assert torch.equal(got, (expected + 30) * 0.5)


def test_fp8_beside_integers_has_a_scale_a_token():
    x = values()
    got = quantise_activations(x, IntType(4, 32, True, activations="token fp8"), None)
    scale = x.abs().amax(1, keepdim=True) / 448
    assert torch.equal(got, (x / scale).to(torch.float8_e4m3fn).float() * scale)


def test_mx_groups_of_fp8_have_powers_of_two():
    x = values(columns=72)  # the last group is short
    got = quantise_activations(x, Fp8Type((1, 32), "group mx"), None)
    for row in range(x.shape[0]):
        for start in range(0, 72, 32):
            group = x[row, start : start + 32].double()
            mantissa, exponent = math.frexp(float(group.abs().max()))
            scale = 2.0 ** (exponent - 1 + (mantissa >= 0.875) - 8)
            expected = (group / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale
            assert torch.equal(got[row, start : start + 32].double(), expected)


@pytest.mark.parametrize("activations", ("token product", "tensor product", "token product asym"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_an_integer_product_is_scaled_once_it_is_summed(activations, dtype):
    x = values().to(dtype)
    codes = torch.randint(0, 256, (5, 64), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    scales = torch.rand(5, 1) / 100 + 0.001
    weight = IntWeight(codes, scales, None, 8, 64, activations=activations)
    got = integer_product(x, weight)
    exact = x.double() @ weight.dequantize(torch.float64).T
    step = (x.double().amax(1) - x.double().amin(1)).clamp(min=x.double().abs().amax(1))[:, None] / 127
    if activations == "tensor product":
        step = step.max()
    bound = step * weight.dequantize(torch.float64).abs().sum(1) + exact.abs() * (
        0 if dtype is torch.float32 else 0.02
    )
    assert got.dtype is dtype and ((got.double() - exact).abs() <= bound + 1e-3).all()
    # Whole multiples of the scales: what integers sum to.
    if activations == "token product" and dtype is torch.float32:
        sums = got.double() / (scales.flatten().double() * (x.double().abs().amax(1, keepdim=True) / 127.5))
        assert ((sums - sums.round()).abs() < 0.05).all()


KINDS = (
    "token",
    "token asym",
    "tensor asym",
    "token asym reciprocal",
    "token fp8",
    "token product",
    "token product asym",
)


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("compute", ("auto", "exact", "checkpoint"))
def test_a_kernel_that_takes_them_rounds_as_the_reference(activations, compute):
    codes = torch.randint(0, 256, (48, 128), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    scales = torch.rand(48, 1) / 100 + 0.001
    weight = IntWeight(codes, scales, None, 8, 128, activations=activations)
    problem = LinearProblem(weight.type, 128, 48, torch.float32, probe_device("cpu"), compute)
    takers = [kernel for kernel in kernels_for("linear") if kernel.why_not(problem) is None]
    x = values(5, 128)
    expected = takers[-1].run(takers[-1].pack(weight, problem), problem, x, None)
    assert takers[-1].name == "reference"
    for kernel in takers:
        got = kernel.run(kernel.pack(weight, problem), problem, x, None)
        allowed = 2e-2 if compute == "auto" else 2e-3 if compute == "checkpoint" else 1e-5
        assert (got - expected).norm() / expected.norm() < allowed, kernel.name
