"""Norms, gates, rotary positions and rows of tables on the GPU, against float64 and torch's own."""

import pytest
import torch

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.triton import elementwise
from pymllm.kernels.triton.elementwise import TritonElementwise
from pymllm.kernels.triton.embedding import TritonFp8Embedding, TritonIntEmbedding

from .gpu import FLOATS, HERE, UNIT, moved, randn
from .linear_checks import problem_for
from .test_float_weights import Fp8Weight
from .test_int_weights import make

OURS, TORCH = TritonElementwise(), TorchElementwise()
DTYPES = (*FLOATS, torch.float32)


def close(found, expected, dtype, roundings=2):
    unit = UNIT.get(dtype, 2.0**-22)
    assert found.dtype is dtype and found.shape == expected.shape
    error = (found.double() - expected).abs() - roundings * unit * expected.abs() - 1e-7
    assert not found.numel() or error.max() <= 0, float(error.max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 48), (3, 48), (2, 3, 100)), ids=str)
def test_norms_equal_float64(dtype, shape):
    x, residual = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    for weight in (None, randn(shape[-1], seed=2, dtype=dtype), randn(shape[-1], seed=2)):
        factors = 1.0 if weight is None else weight.double()
        values = x.double()
        normed = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * factors
        close(OURS.rms_norm(x, weight, 1e-6), normed, dtype)
        found, total = OURS.rms_norm(x, weight, 1e-6, residual)
        close(total, x.double() + residual.double(), dtype, 1)
        values = total.double()
        normed = values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * factors
        close(found, normed, dtype)


def test_rows_longer_than_a_block_are_read_twice(monkeypatch):
    monkeypatch.setattr(elementwise, "LONGEST_ROW", 32)
    x, residual = randn(3, 100).half(), randn(3, 100, seed=1).half()
    for other in (None, residual):
        found, expected = OURS.rms_norm(x, x[0], 1e-6, other), TORCH.rms_norm(x, x[0], 1e-6, other)
        for one, two in zip(*((t if other is not None else (t,)) for t in (found, expected)), strict=True):
            assert torch.allclose(one, two, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_equal_float64_and_large_ones_do_not_overflow(dtype):
    x = randn(5, 2 * 70, dtype=dtype) * 3
    x[0, :4] = torch.tensor([-1e4, 1e4, -88.0, 0.0])
    gate, up = x.double().chunk(2, -1)
    close(OURS.silu_and_mul(x), gate * gate.sigmoid() * up, dtype, 3)
    assert OURS.silu_and_mul(x[:0]).shape == (0, 70)


@pytest.mark.parametrize("size, rotary", ((32, 32), (80, 32), (24, 20)))
def test_rotation_equals_float64_and_passes_the_rest_bit_for_bit(size, rotary):
    for dtype in DTYPES:
        x = randn(7, 3 * size, dtype=dtype).view(7, 3, size)[:, :2]  # strided, as a slice of q, k and v
        angles = randn(7, rotary // 2, seed=1)
        cos, sin = angles.cos(), angles.sin()
        first, second = x[..., :rotary].double().chunk(2, -1)
        c, s = cos.double()[:, None], sin.double()[:, None]
        rotated = torch.cat((first * c - second * s, second * c + first * s), -1)
        found = OURS.rotate(x, cos, sin)
        bound = 2 * UNIT.get(dtype, 2.0**-22) * torch.cat((first.abs() + second.abs(),) * 2, -1) + 1e-7
        assert ((found[..., :rotary].double() - rotated).abs() <= bound).all()
        assert torch.equal(found[..., rotary:], x[..., rotary:])


@pytest.mark.parametrize("ids", ([], [[0, 69], [5, 5]]), ids=str)
def test_rows_of_tables_are_the_dequantised_ones(ids):
    fp8 = Fp8Weight.from_float(randn(70, 96).cpu(), block=(64, 32), activations="float")
    for kernel, weight in ((TritonIntEmbedding(), make(4, 32, 96, False)), (TritonFp8Embedding(), fp8)):
        problem = problem_for(weight, torch.float16)
        packed = moved(kernel.pack(weight, problem))
        index = torch.tensor(ids, dtype=torch.int64, device=HERE)
        found = kernel.run(packed, problem, index)
        assert torch.equal(found.cpu(), weight.dequantize(torch.float16)[index.cpu()])
