"""RMSNorm, silu·mul and rotary in native code against float64 and against the layers, on every path."""

import math

import pytest
import torch
import torch.nn.functional as F

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.native.elementwise import NativeElementwise
from pymllm.kernels.native.float_linear import FLOAT_TYPES, isa_code, native
from pymllm.kernels.registry import select

from ..tensors import floats
from .integer_cases import PATHS, needs_native

pytestmark = needs_native

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 2, 7, 16, 33, 64, 255, 256, 257, 300, 1000]
# A unit in the last place, relative: each of the (at most two) roundings to the dtype costs half of one.
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FLOAT32_MATHS = 2**-20  # what float32 arithmetic adds: a sum of squares, an exponential, a division
SMALLEST = {torch.float32: 2**-120, torch.bfloat16: 2**-120, torch.float16: 2**-24}


def rms_norm(x, weight, eps, residual=None, isa=None):
    return NativeElementwise(isa).rms_norm(x, weight, eps, residual)


def silu_and_mul(x, isa=None):
    return NativeElementwise(isa).silu_and_mul(x)


def rotate(x, cos, sin, isa=None):
    return NativeElementwise(isa).rotate(x, cos, sin)


def assert_close(y, exact, magnitude=None, factor=0.0):
    """factor: what an intermediate result was multiplied by, which may have been subnormal in the dtype."""
    magnitude = exact.abs() if magnitude is None else magnitude
    tolerance = (1.01 * UNIT[y.dtype] + FLOAT32_MATHS) * magnitude + SMALLEST[y.dtype] * (1 + factor)
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= tolerance).all(), f"off by {(y.double() - exact).abs().max()}"


def exact_rms_norm(x, weight, eps):
    values = x.double()
    normed = values / (values.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight.double()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_equals_float64(path, dtype, scale):
    for size in SIZES:
        for rows in (0, 1, 5):
            x, weight = floats(rows, size, dtype=dtype, scale=scale), floats(size, dtype=dtype, seed=2)
            assert_close(rms_norm(x, weight, 1e-6, isa=path), exact_rms_norm(x, weight, 1e-6))
            assert_close(rms_norm(x, None, 1e-6, isa=path), exact_rms_norm(x, None, 1e-6))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norm_returns_the_residual_sum_that_torch_has(path, dtype):
    for size in SIZES:
        x, residual = floats(3, size, dtype=dtype), floats(3, size, dtype=dtype, seed=3, scale=4.0)
        weight = floats(size, dtype=dtype, seed=2)
        x_before, residual_before = x.clone(), residual.clone()
        y, summed = rms_norm(x, weight, 1e-5, residual, isa=path)
        assert torch.equal(summed, x + residual)
        assert_close(y, exact_rms_norm(summed, weight, 1e-5))
        assert torch.equal(x, x_before)
        assert torch.equal(residual, residual_before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_and_mul_equals_float64(path, dtype):
    for size in SIZES:
        for rows in (0, 1, 5):
            x = floats(rows, 2 * size, dtype=dtype, scale=6.0)
            gate, up = x.double().chunk(2, dim=-1)
            assert_close(silu_and_mul(x, isa=path), F.silu(gate) * up, factor=up.abs())


@pytest.mark.parametrize("path", PATHS)
def test_silu_holds_over_the_whole_range_of_the_exponential(path):
    gate = torch.cat((torch.linspace(-120, 120, 9601), torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30])))
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    exact = F.silu(gate.double())
    # Below -80 the result is smaller than 1e-33 and may stay there instead of reaching zero.
    tolerance = torch.where(gate < -80, 1e-5 * torch.ones_like(exact), 2**-20 * exact.abs())
    tolerance = torch.where((gate < -80) & (gate > -200), 1e-33 * torch.ones_like(exact), tolerance)
    assert ((silu_and_mul(x, isa=path)[0].double() - exact).abs() <= tolerance).all()
    assert silu_and_mul(torch.tensor([[math.nan, 1.0]]), isa=path).isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("head_size", "rotary_size"), [(2, 2), (64, 64), (80, 80), (128, 128), (128, 32), (1030, 1030)]
)
def test_rotary_equals_the_layer_and_passes_the_rest(path, dtype, head_size, rotary_size):
    for tokens, heads in ((0, 2), (1, 1), (3, 5)):
        x = floats(tokens, heads, head_size, dtype=dtype)
        angles = torch.rand(tokens, rotary_size // 2, generator=torch.Generator().manual_seed(4)) * 6.28
        cos, sin = angles.cos(), angles.sin()
        y = rotate(x, cos, sin, isa=path)
        rotated = x[..., :rotary_size]
        exact = rotate_halves_exactly(rotated, cos, sin)
        magnitude = rotated.double().unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 2)
        assert_close(y[..., :rotary_size], exact, magnitude)
        assert torch.equal(y[..., rotary_size:], x[..., rotary_size:])
        assert_close(
            TorchElementwise().rotate(rotated, cos, sin), exact, magnitude
        )  # torch's meets the same bound


def rotate_halves_exactly(x, cos, sin):
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@pytest.mark.parametrize("path", PATHS)
def test_rotary_reads_slices_of_a_fused_projection(path):
    fused = floats(4, 3 * 64 + 10, dtype=torch.bfloat16)
    x = fused[:, 10 : 10 + 2 * 64].view(4, 2, 64)
    cos, sin = torch.rand(4, 32), torch.rand(4, 32)
    assert torch.equal(rotate(x, cos, sin, isa=path), rotate(x.contiguous(), cos, sin, isa=path))
    crossed = floats(4, 64, 2, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(rotate(crossed, cos, sin, isa=path), rotate(crossed.contiguous(), cos, sin, isa=path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_widening_is_what_torch_does(path, dtype):
    for count in (0, 1, 7, 16, 33, 257, 70001):
        x = floats(count, dtype=dtype, scale=100.0)
        if count > 6:
            x[:6] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7])
        y = torch.empty(count)
        native().widen(x.data_ptr(), y.data_ptr(), FLOAT_TYPES[dtype], count, isa_code(path), 2)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y.nan_to_num(3.0).view(torch.int32), x.float().nan_to_num(3.0).view(torch.int32))


def test_rows_of_a_table_are_what_torch_takes():
    table, ids = torch.randn(9, 5), torch.tensor([0, 8, -1, -9, 3, 3])
    y = torch.empty(6, 5)

    def copy(ids):
        native().copy_rows(table.data_ptr(), 9, 20, ids.data_ptr(), ids.numel(), y.data_ptr())

    copy(ids)
    assert torch.equal(y, table[ids])
    for wrong in (9, -10):
        with pytest.raises(IndexError, match="outside the table"):
            copy(torch.tensor([0, wrong]))


@pytest.mark.parametrize("path", PATHS)
def test_leading_dimensions_and_strides_are_kept(path):
    weight = torch.ones(6)
    x = floats(2, 6, 3, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(rms_norm(x, weight, 1e-6, isa=path), rms_norm(x.contiguous(), weight, 1e-6, isa=path))
    assert silu_and_mul(x, isa=path).shape == (2, 3, 3)
    assert torch.equal(silu_and_mul(x, isa=path), silu_and_mul(x.contiguous(), isa=path))


@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_the_number_of_threads(path):
    x, weight = floats(300, 1000, dtype=torch.bfloat16), floats(1000, dtype=torch.bfloat16, seed=2)
    cos, sin = torch.rand(300, 50), torch.rand(300, 50)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    rms_norm(x, weight, 1e-6, x, isa=path)[0],
                    silu_and_mul(x, isa=path),
                    rotate(x.view(300, 10, 100), cos, sin, isa=path),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_gives_the_same_within_rounding(dtype):
    x, weight = floats(3, 64, dtype=dtype), floats(64, dtype=dtype, seed=2)
    cos, sin = torch.rand(3, 8), torch.rand(3, 8)

    def all_of_them(kernel):
        normed, summed = kernel.rms_norm(x, weight, 1e-6, x)
        return normed, summed, kernel.silu_and_mul(x), kernel.rotate(x.view(3, 2, 32), cos, sin)

    for a, b in zip(all_of_them(NativeElementwise()), all_of_them(TorchElementwise()), strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=2 * UNIT[dtype] + FLOAT32_MATHS, atol=2 * UNIT[dtype])


def test_the_registry_chooses_it_on_a_cpu_and_torch_without_the_extension(monkeypatch):
    problem = ElementwiseProblem(torch.float32, probe_device("cpu"))
    assert select("elementwise", problem).kernel.name == "native"
    monkeypatch.setattr("pymllm.kernels.native.elementwise.native_missing_reason", lambda: "not built")
    select.cache_clear()
    try:
        chosen = select("elementwise", problem)
    finally:
        select.cache_clear()
    refused = {refusal.kernel: refusal.why for refusal in chosen.refused}
    assert chosen.kernel.name == "torch" and refused["native"] == "not built"


def test_tensors_that_native_code_cannot_read_are_refused():
    with pytest.raises(ValueError, match="float64"):
        silu_and_mul(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="meta"):
        silu_and_mul(torch.zeros(2, 4, device="meta"))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="even"):
        silu_and_mul(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="cos"):
        rotate(torch.zeros(2, 1, 4), torch.zeros(3, 2), torch.zeros(3, 2))
