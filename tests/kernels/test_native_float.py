"""Native linear layers over bf16, f16 and fp8 weights against float64: every path, odd shapes, every code."""

import dataclasses
import functools
import math
import platform
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pymllm.kernels.canonical import (
    CodebookWeight,
    DenseType,
    DenseWeight,
    Fp8Type,
    Fp8Weight,
    IntType,
    on_meta,
)
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.codebook import NativeCodebook
from pymllm.kernels.native.float_linear import TORCH_TOKENS, NativeFloatLinear
from pymllm.kernels.native.fp8 import NativeFp8Linear
from pymllm.kernels.registry import select

from ..operators import work_of
from ..tensors import floats
from .integer_cases import PATHS, needs_native

# M tokens, O out_features, I in_features

pytestmark = needs_native

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 31, 32, 33]
# Below and above a register, a tile of rows (4), a block of rows (32) and a chunk of inputs (1024).
SHAPES = [(1, 1), (3, 31), (5, 64), (33, 65), (31, 130), (70, 200), (37, 1000), (36, 2090)]
BLOCKS = [(0, 0), (1, 0), (16, 0), (0, 64), (1, 64), (8, 128), (128, 128), (16, 192), (1, 32), (16, 32)]
OUTPUT_ROUNDING = {
    torch.float32: 2**-24,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}  # half a unit in the last place


def device(path: str) -> Device:
    return Device("cpu", f"forced {path}", isa=path)


def dense_case(path, out_features, in_features, weight_dtype, dtype):
    weight = DenseWeight(floats(out_features, in_features, dtype=weight_dtype, seed=1))
    problem = LinearProblem(weight.type, in_features, out_features, dtype, device(path))
    return NativeFloatLinear(), weight, problem


def fp8_case(path, out_features, in_features, block, dtype):
    weight = Fp8Weight.from_float(
        floats(out_features, in_features, dtype=torch.float32, seed=1), block=block, activations="float"
    )
    problem = LinearProblem(weight.type, in_features, out_features, dtype, device(path))
    return NativeFp8Linear(), weight, problem


def codebook_case(path, out_features, in_features, group, dtype):
    generator = torch.Generator().manual_seed(1)
    groups = -(-in_features // group)
    weight = CodebookWeight(
        torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=generator),
        torch.randn(16, generator=generator).sort().values,
        torch.rand(out_features, groups, generator=generator) + 0.1,
        "nf4",
        min(group, in_features),
    )
    problem = LinearProblem(weight.type, in_features, out_features, dtype, device(path))
    return NativeCodebook(), weight, problem


def assert_as_exact_as_float32(y, x, weight, bias):
    """Within float32 rounding of the float64 result.

    A sum of I products has about I roundings, each within 2^-24 of the magnitudes summed so far; they are as often up
    as down, so that they grow as the square root. 16 covers the folding of lanes, the scale and the bias. The
    magnitudes are Σ|w||x|, not |y|: cancellation is not the kernel's fault. Then y is rounded to its dtype.
    """
    exact_weight, exact_x = weight.dequantize(torch.float64), x.double()
    exact, magnitude = exact_x @ exact_weight.T, exact_x.abs() @ exact_weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    tolerance = (
        (16 + math.sqrt(x.shape[-1])) * 2**-24 * magnitude + OUTPUT_ROUNDING[y.dtype] * exact.abs() + 2**-25
    )
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= tolerance).all(), f"off by {(y.double() - exact).abs().max()}"


def check(kernel, weight, problem, tokens, *, with_bias=True, scale=1.0):
    x = floats(tokens, problem.in_features, dtype=problem.dtype, seed=2, scale=scale)
    bias = floats(problem.out_features, dtype=problem.dtype, seed=3) if with_bias else None
    assert kernel.why_not(problem) is None or problem.device.isa in ("portable", "neon_dotprod")
    y = kernel.run(kernel.pack(weight, problem), problem, x, bias)
    assert y.dtype is problem.dtype
    assert_as_exact_as_float32(y, x, weight, bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dense_weights_are_multiplied_as_exactly_as_float32_allows(path, weight_dtype, dtype):
    for out_features, in_features in SHAPES:
        case = dense_case(path, out_features, in_features, weight_dtype, dtype)
        for tokens in TOKENS:
            check(*case, tokens)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fp8_weights_are_multiplied_as_exactly_as_float32_allows(path, block, dtype):
    for out_features, in_features in SHAPES:
        case = fp8_case(path, out_features, in_features, block, dtype)
        for tokens in TOKENS[::2] if in_features > 500 else TOKENS:
            check(*case, tokens)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_of_a_codebook_are_multiplied_as_exactly_as_float32_allows(path, dtype):
    for shape, group in (
        ((1, 2), 64),
        ((3, 30), 64),
        ((5, 64), 64),
        ((33, 130), 4096),
        ((31, 192), 64),
        ((70, 256), 128),
        ((37, 1028), 4096),
        ((36, 2112), 64),
        ((9, 1152), 192),
    ):
        case = codebook_case(path, *shape, group, dtype)
        for tokens in TOKENS[::2] if shape[1] > 500 else TOKENS:
            check(*case, tokens)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [97, 200])
def test_a_prefill_in_several_panels_is_as_exact_as_a_small_one(path, tokens):
    check(*dense_case(path, 70, 1100, torch.bfloat16, torch.float32), tokens)
    check(*fp8_case(path, 70, 1100, (128, 128), torch.bfloat16), tokens)
    check(*codebook_case(path, 70, 1152, 64, torch.bfloat16), tokens)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_large_magnitudes_do_not_overflow_on_the_way(path, tokens):
    check(*dense_case(path, 33, 300, torch.bfloat16, torch.float32), tokens, scale=1e30)
    check(*fp8_case(path, 33, 300, (128, 128), torch.float32), tokens, scale=1e30)
    check(*fp8_case(path, 33, 300, (1, 0), torch.bfloat16), tokens, scale=1e30)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("block", [(0, 0), (1, 0), (16, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_every_e4m3_code_is_decoded_exactly(path, block, tokens):
    """Against torch's own conversion, and by unit vectors: all other products are zero, so nothing may differ."""
    in_features = 70
    numbers = torch.cat((torch.arange(0x7F), torch.arange(0x80, 0xFF)))  # all but the two NaN codes
    index = (torch.arange(256)[:, None] + 37 * torch.arange(in_features)[None]) % len(numbers)
    assert len(index.unique()) == len(numbers)
    codes = numbers[index].to(torch.uint8).view(torch.float8_e4m3fn)
    rows = {0: 1, 1: 256, 16: 16}[block[0]]
    columns = 2 if block[1] else 1
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(4)) + 0.1
    weight = Fp8Weight(codes, scales, block)
    problem = LinearProblem(weight.type, in_features, 256, torch.float32, device(path))
    kernel = NativeFp8Linear()
    packed = kernel.pack(weight, problem)
    units = torch.eye(in_features)
    products = torch.cat([kernel.run(packed, problem, part, None) for part in units.split(tokens)])
    assert torch.equal(products.T, weight.dequantize(torch.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_16_bit_weight_is_widened_exactly(path, weight_dtype):
    # 16 columns as they are, then zeros: rows of one value would hide a wrong order.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(weight_dtype)
    values = torch.where(values.isfinite(), values, torch.zeros_like(values)).view(-1, 64)
    kernel, weight = NativeFloatLinear(), DenseWeight(values)
    problem = LinearProblem(weight.type, 64, values.shape[0], torch.float32, device(path))
    packed = kernel.pack(weight, problem)
    for tokens in (1, 64):
        products = torch.cat(
            [kernel.run(packed, problem, part, None) for part in torch.eye(64).split(tokens)]
        )
        assert torch.equal(products.T, values.float())


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="torch can set this on x86 only"
)
@pytest.mark.parametrize("path", PATHS)
def test_e4m3_subnormals_survive_flushing_of_float32_subnormals(path):
    codes = torch.arange(0, 8, dtype=torch.uint8).repeat(8, 8).view(torch.float8_e4m3fn)
    weight = Fp8Weight(codes, torch.ones(1, 1), (0, 0))
    problem = LinearProblem(weight.type, 64, 8, torch.float32, device(path))
    kernel = NativeFp8Linear()
    expected = weight.dequantize(torch.float32)
    assert torch.set_flush_denormal(True)
    try:
        products = kernel.run(kernel.pack(weight, problem), problem, torch.eye(64), None)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(products.T, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_makes_its_output_nan_and_no_other(path, tokens, code):
    kernel, weight, problem = fp8_case(path, 40, 130, (1, 0), torch.float32)
    weight.weight.view(torch.uint8)[7, 129] = code
    y = kernel.run(
        kernel.pack(weight, problem), problem, floats(tokens, 130, dtype=torch.float32, seed=2), None
    )
    assert y[:, 7].isnan().all()
    assert y[:, torch.arange(40) != 7].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_an_infinite_activation_spreads_as_in_torch(path, tokens):
    kernel, weight, problem = dense_case(path, 40, 70, torch.bfloat16, torch.float32)
    x = floats(tokens, 70, dtype=torch.float32, seed=2)
    x[0, 69] = math.inf
    y = kernel.run(kernel.pack(weight, problem), problem, x, None)
    assert torch.equal(y[0], weight.weight[:, 69].float().sign() * math.inf)
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_tokens_and_leading_dimensions_keep_their_shape(path, dtype):
    for kernel, weight, problem in (
        dense_case(path, 9, 20, torch.float16, dtype),
        fp8_case(path, 9, 20, (1, 0), dtype),
    ):
        packed = kernel.pack(weight, problem)
        for shape in ((0, 20), (2, 0, 20), (20,), (2, 3, 20)):
            x = floats(*shape, dtype=dtype, seed=5)
            y = kernel.run(packed, problem, x, None)
            assert y.shape == (*shape[:-1], 9)
            assert_as_exact_as_float32(y, x, weight, None)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_that_are_not_contiguous_are_read_in_their_order(path):
    for kernel, weight, problem in (
        dense_case(path, 40, 70, torch.bfloat16, torch.bfloat16),
        fp8_case(path, 40, 70, (1, 0), torch.bfloat16),
    ):
        packed = kernel.pack(weight, problem)
        for x in (
            floats(70, 5, dtype=torch.bfloat16, seed=6).T,
            floats(5, 140, dtype=torch.bfloat16, seed=6)[:, ::2],
            floats(1, 70, dtype=torch.bfloat16, seed=6).expand(5, 70),
        ):
            assert_as_exact_as_float32(kernel.run(packed, problem, x, None), x, weight, None)


def test_a_dense_weight_that_is_not_contiguous_is_packed_in_its_order():
    weight = DenseWeight(floats(70, 40, dtype=torch.bfloat16, seed=7).T)
    problem = LinearProblem(weight.type, 70, 40, torch.float32, device(PATHS[0]))
    check(NativeFloatLinear(), weight, problem, 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_results_do_not_depend_on_the_number_of_threads(path, tokens):
    before = torch.get_num_threads()
    for kernel, weight, problem in (
        dense_case(path, 301, 1100, torch.bfloat16, torch.float32),
        fp8_case(path, 301, 1100, (16, 64), torch.float16),
        fp8_case(path, 301, 1100, (1, 32), torch.float16),
    ):
        packed = kernel.pack(weight, problem)
        x = floats(tokens, 1100, dtype=problem.dtype, seed=8)
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel.run(packed, problem, x, None))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("path", PATHS)
def test_a_token_does_not_see_the_tokens_beside_it(path):
    for kernel, weight, problem in (
        dense_case(path, 45, 1100, torch.float16, torch.float32),
        fp8_case(path, 45, 1100, (16, 128), torch.bfloat16),
        fp8_case(path, 45, 1100, (1, 32), torch.bfloat16),
    ):
        packed = kernel.pack(weight, problem)
        x = floats(100, 1100, dtype=problem.dtype, seed=9)
        alone = torch.cat([kernel.run(packed, problem, row, None) for row in x.split(1)])
        for tokens in (2, 7, 33, 100):
            assert torch.equal(kernel.run(packed, problem, x[:tokens], None), alone[:tokens])


def test_several_python_threads_get_the_results_of_one():
    cases = []
    for tokens in (1, 4, 20, 100):
        for kernel, weight, problem in (
            dense_case(PATHS[0], 150, 1500, torch.bfloat16, torch.float32),
            fp8_case(PATHS[0], 150, 1500, (128, 128), torch.bfloat16),
        ):
            x = floats(tokens, 1500, dtype=problem.dtype, seed=tokens)
            packed = kernel.pack(weight, problem)
            cases.append((kernel, packed, problem, x, kernel.run(packed, problem, x, None)))

    def run_all(_: int) -> bool:
        return all(torch.equal(k.run(packed, problem, x, None), y) for k, packed, problem, x, y in cases)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(run_all, range(24)))
    finally:
        torch.set_num_threads(before)


def test_pack_keeps_the_tensor_and_unpack_gives_it_back():
    kernel, weight, problem = dense_case(PATHS[0], 9, 20, torch.bfloat16, torch.bfloat16)
    packed = kernel.pack(weight, problem)
    assert packed["weight"].data_ptr() == weight.weight.data_ptr()
    assert torch.equal(kernel.unpack(packed, problem).weight, weight.weight)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_fp8_unpacks_bit_for_bit(block):
    kernel, weight, problem = fp8_case(PATHS[0], 40, 200, block, torch.float32)
    weight.weight.view(torch.uint8)[0] = torch.arange(56, 256)  # both NaNs too
    static = dataclasses.replace(weight, activations="static", input_scales=torch.tensor([0.5, 2.0]))
    for given in (weight, static):
        problem = dataclasses.replace(problem, weight=given.type)
        packed = kernel.pack(given, problem)
        assert packed["weight"].data_ptr() == given.weight.data_ptr()
        back = kernel.unpack(packed, problem)
        assert back.type == given.type
        for name, tensor in given.tensors().items():
            assert torch.equal(back.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_packing_on_meta_counts_the_same_bytes():
    for kernel, weight, problem in (
        dense_case(PATHS[0], 9, 20, torch.bfloat16, torch.bfloat16),
        fp8_case(PATHS[0], 40, 200, (16, 64), torch.float32),
    ):
        real, meta = kernel.pack(weight, problem), kernel.pack(on_meta(weight), problem)
        assert {n: (t.shape, t.dtype) for n, t in real.items()} == {
            n: (t.shape, t.dtype) for n, t in meta.items()
        }
        assert all(t.is_meta for t in meta.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_selection_prefers_the_native_kernels_where_they_can_run(dtype):
    for kernel, _, problem in (
        dense_case(PATHS[0], 9, 20, torch.bfloat16, dtype),
        fp8_case(PATHS[0], 9, 20, (1, 0), dtype),
    ):
        if kernel.why_not(problem) is None:
            assert select("linear", problem).kernel.name == kernel.name


def test_refusals_say_why():
    dense = LinearProblem(DenseType(torch.bfloat16), 64, 64, torch.bfloat16, device("avx2"))
    fp8 = LinearProblem(Fp8Type((128, 128), "token"), 64, 64, torch.bfloat16, device("avx2"))
    gpu = Device("cuda", "a GPU", capability=(9, 0))
    for kernel, problem, word in (
        (NativeFloatLinear(), dataclasses.replace(dense, weight=DenseType(torch.float32)), "float32"),
        (NativeFloatLinear(), dataclasses.replace(dense, weight=IntType(4, 128, True)), "int4"),
        (NativeFloatLinear(), dataclasses.replace(dense, device=gpu), "CPU"),
        (NativeFloatLinear(), dataclasses.replace(dense, dtype=torch.float64), "float64"),
        (NativeFloatLinear(), dataclasses.replace(dense, device=device("portable")), "portable"),
        (NativeFp8Linear(), dataclasses.replace(fp8, compute="checkpoint"), "token"),
        (NativeFp8Linear(), dataclasses.replace(fp8, weight=Fp8Type((32, 48), "float")), "32x48"),
        (NativeFp8Linear(), dataclasses.replace(fp8, device=gpu), "CPU"),
        (NativeFp8Linear(), dataclasses.replace(fp8, weight=DenseType(torch.bfloat16)), "bfloat16"),
    ):
        assert word in (kernel.why_not(problem) or ""), (kernel.name, problem)
    assert NativeFp8Linear().why_not(fp8) is None
    assert NativeFloatLinear().why_not(dense) is None


def test_tensors_of_the_wrong_shape_or_dtype_are_refused():
    kernel, weight, problem = dense_case(PATHS[0], 9, 20, torch.bfloat16, torch.float32)
    packed = kernel.pack(weight, problem)
    x = torch.zeros(2, 20)
    for wrong in (
        torch.zeros(2, 21),
        torch.zeros(2, 20, dtype=torch.float64),
        torch.zeros(2, 20, device="meta"),
    ):
        with pytest.raises(ValueError, match="x must be"):
            kernel.run(packed, problem, wrong, None)
    with pytest.raises(ValueError, match="bias"):
        kernel.run(packed, problem, x, torch.zeros(8))
    with pytest.raises(ValueError, match="weight"):
        kernel.run({"weight": packed["weight"].T}, problem, x, None)
    fp8_kernel, fp8_weight, fp8_problem = fp8_case(PATHS[0], 9, 130, (8, 128), torch.float32)
    with pytest.raises(ValueError, match="scales"):
        fp8_kernel.pack(dataclasses.replace(fp8_weight, scales=fp8_weight.scales[:1]), fp8_problem)


def test_more_tokens_than_torch_takes_over_at_are_as_exact():
    check(*dense_case(PATHS[0], 70, 600, torch.bfloat16, torch.bfloat16), TORCH_TOKENS + 1)
    kernel, _, problem = dense_case(PATHS[0], 70, 600, torch.bfloat16, torch.bfloat16)
    native_only = dataclasses.replace(problem, dtype=torch.float32)
    assert "torch" not in kernel.numerics(native_only)


def test_a_call_is_one_native_call_into_a_new_tensor(monkeypatch):
    """benchmarks/cpu_dispatch.py times the Python around it."""
    for kernel, weight, problem in (
        dense_case(PATHS[0], 4, 64, torch.bfloat16, torch.float32),
        fp8_case(PATHS[0], 4, 64, (1, 0), torch.float32),
    ):
        packed, x = kernel.pack(weight, problem), torch.zeros(1, 64)
        work = work_of(functools.partial(kernel.run, packed, problem, x, None), monkeypatch)
        assert work == ["new_empty", "float_linear"], kernel.name
