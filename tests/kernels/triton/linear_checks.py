"""What every linear GPU kernel must do, checked against float64."""

# T tokens, O out_features, I in_features

import torch

from pymllm.kernels.linear import LinearProblem

from .gpu import DEVICE, HERE, UNIT, moved, randn

TOKENS = (0, 1, 3, 70, 600)  # each way of multiplying: nothing, one row, split sums, fused, expanded


def problem_for(weight, dtype, compute="auto"):
    out_features, in_features = weight.shape
    return LinearProblem(weight.type, in_features, out_features, dtype, DEVICE, compute)


def check_round_trip(kernel, weight, dtype):
    """Packing is undone bit for bit, and counts its bytes on meta tensors."""
    problem = problem_for(weight, dtype)
    packed = kernel.pack(weight, problem)
    again = kernel.unpack(packed, problem)
    assert again.type == weight.type
    assert again.tensors().keys() == weight.tensors().keys()
    for name, tensor in weight.tensors().items():
        found = again.tensors()[name]
        assert found.dtype is tensor.dtype and torch.equal(
            found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def check_products(kernel, weight, dtype, tokens=TOKENS, magnitude=1.0):
    """x @ weight.T + bias within a rounding of each weight and one of the result, for all numbers of rows."""
    problem = problem_for(weight, dtype)
    assert kernel.why_not(problem) is None
    packed = moved(kernel.pack(weight, problem))
    exact = weight.dequantize(torch.float64).to(HERE)
    bias = randn(weight.shape[0], seed=1, dtype=dtype)
    for count in tokens:
        wide = randn(count, 2 * weight.shape[1], seed=2 + count) * magnitude
        x = (
            wide.to(dtype)[:, ::2] if count == 3 else wide.to(dtype)[:, : weight.shape[1]]
        )  # also not contiguous
        for b in (None, bias):
            result = kernel.run(packed, problem, x, b)
            expected = x.double() @ exact.t() + (0 if b is None else b.double())
            assert result.shape == expected.shape and result.dtype is dtype
            # Each weight and the result are rounded once (expanded weights twice: by torch's product too);
            # float32 sums of I terms add I * 2^-24.
            bound = (x.double().abs() @ exact.t().abs()) * (UNIT[dtype] + exact.shape[1] * 2.0**-24)
            bound = bound + 2 * UNIT[dtype] * expected.abs() + 1e-6
            if b is not None:
                bound = bound + 2 * UNIT[dtype] * b.double().abs()
            over = (result.double() - expected).abs() - bound
            assert count == 0 or over.max() <= 0, (count, float(over.max()))
