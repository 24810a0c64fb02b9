"""The native kernels over other integers than plain int4, against float64: int8, float offsets, codebooks."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pymllm.config import Execution
from pymllm.kernels.canonical import CodebookWeight, DenseWeight, Fp8Weight, IntWeight, on_meta
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.native.embedding import (
    NativeFp4Embedding,
    NativeInt4Embedding,
    NativeInt8Embedding,
    NativeIntegerCodebookEmbedding,
)
from pymllm.kernels.native.fp4 import NativeFp4
from pymllm.kernels.native.int4 import NativeInt4
from pymllm.kernels.native.int8 import NativeInt8
from pymllm.kernels.native.integer_codebook import NativeIntegerCodebook
from pymllm.quantization.binding import bind, bind_shared

from ..tensors import floats
from .integer_cases import FLOATS, HALF_UNIT, PATHS, assert_close, needs_native

# M tokens, O out_features, I in_features, G group_size

pytestmark = needs_native
TOKENS = [0, 1, 2, 3, 4, 5, 8, 9, 15, 17, 33]


def integers(bits, shape, *, zeros="none", scales=torch.float16, seed=0):
    """zeros: "none", "each", or "offsets"."""
    out_features, in_features, group = shape
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)

    offsets = torch.randn(out_features, groups, generator=generator) * 0.05 if zeros == "offsets" else None
    return IntWeight(
        codes(out_features, in_features),
        (torch.rand(out_features, groups, generator=generator) * 0.01 + 0.001).to(scales),
        codes(out_features, groups) if zeros == "each" else None,
        bits,
        min(group, in_features),
        offsets=offsets,
    )


def halved(weight):
    return dataclasses.replace(weight, offsets=weight.offsets.half())


def fp4(shape, *, scales=torch.float8_e8m0fnu, rows=False, codebook="e2m1"):
    out_features, in_features, group = shape
    generator = torch.Generator().manual_seed(0)
    table = torch.tensor(INTEGER_CODEBOOKS[codebook].values)
    stored = (
        torch.rand(out_features, in_features // group, generator=generator) * 3 + 0.6
    ) / table.abs().max()
    return CodebookWeight(
        torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=generator),
        table,
        stored.log2().round().exp2().to(scales) if scales is torch.float8_e8m0fnu else stored.to(scales),
        codebook,
        group,
        torch.rand(out_features, generator=generator) + 0.5 if rows else None,
    )


# Tails of the 16 rows and 4 streams of a tile; every group of a block, larger ones, and rows that must be filled up.
SHAPES = [
    (1, 32, 32),
    (7, 96, 16),
    (33, 192, 64),
    (65, 256, 128),
    (34, 512, 256),
    (23, 72, 72),
    (9, 1100, 1100),
]
CASES = {
    **{
        f"int{bits}-{zeros}-{str(scales)[6:]}-{'x'.join(map(str, shape))}": (
            lambda bits=bits, zeros=zeros, scales=scales, shape=shape: integers(
                bits, shape, zeros=zeros, scales=scales
            )
        )
        for bits in (8, 4)
        for zeros in ("none", "each", "offsets")
        for scales, shape in zip(
            (
                torch.float32,
                torch.float16,
                torch.bfloat16,
                torch.float32,
                torch.bfloat16,
                torch.float16,
                torch.float32,
            ),
            SHAPES,
            strict=True,
        )
    },
    "int4-f16-offsets": lambda: halved(integers(4, (40, 96, 32), zeros="offsets")),
    "int6-g16": lambda: integers(6, (40, 256, 16), scales=torch.float32),
    "int3-g32": lambda: integers(3, (40, 96, 32), zeros="each"),
    "mxfp4": lambda: fp4((33, 192, 32)),
    "nvfp4": lambda: fp4((50, 208, 16), scales=torch.float8_e4m3fn, rows=True),
    "fp4-g64-f32": lambda: fp4((18, 128, 64), scales=torch.float32),
    **{
        f"{codebook}-g{shape[2]}-{str(scales)[6:]}": (
            lambda codebook=codebook, scales=scales, shape=shape: fp4(shape, scales=scales, codebook=codebook)
        )
        for codebook, scales, shape in (
            ("iq4", torch.float16, (33, 192, 32)),
            ("iq4", torch.float32, (70, 256, 32)),
            ("iq4", torch.float8_e8m0fnu, (20, 128, 64)),
            ("iq3_xxs", torch.float32, (33, 192, 32)),
            ("iq3_s", torch.bfloat16, (50, 256, 128)),
            ("iq2", torch.float32, (50, 208, 16)),
            ("iq1", torch.float32, (23, 96, 16)),
        )
    },
    "iq4-row": lambda: fp4((23, 72, 72), scales=torch.float32, rows=True, codebook="iq4"),
}


def kernel_of(weight):
    if isinstance(weight, CodebookWeight):
        return NativeFp4() if weight.codebook == "e2m1" else NativeIntegerCodebook()
    return NativeInt4() if weight.bits <= 4 else NativeInt8()


def problem_of(weight, dtype=torch.float32, path=None, compute="auto"):
    out_features, in_features = weight.shape
    device = Device("cpu", f"forced {path}", isa=path)
    return LinearProblem(weight.type, in_features, out_features, dtype, device, compute)


# Float offsets, and zero points far from the codes, are summed apart from the codes: their products cancel.
APART = 2**-20


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", CASES)
def test_every_path_agrees_with_float64(path, name):
    weight = CASES[name]()
    kernel = kernel_of(weight)
    for dtype in FLOATS:
        problem = problem_of(weight, dtype, path)
        assert kernel.why_not(problem) is None
        packed, bias = kernel.pack(weight, problem), floats(weight.shape[0], dtype=dtype, seed=2)
        for tokens in TOKENS:
            x = floats(tokens, weight.shape[1], dtype=dtype)
            exact = tokens <= kernel.exact_tokens[dtype]
            for b in (None, bias):
                assert_close(kernel.run(packed, problem, x, b), x, weight, b, exact=exact, within=APART)
        x = floats(weight.shape[1], 7, dtype=dtype).t()  # strided, and more tokens than are exact by default
        problem = dataclasses.replace(problem, compute="exact")
        assert_close(kernel.run(packed, problem, x, None), x, weight, None, exact=True, within=APART)


@pytest.mark.parametrize("name", CASES)
def test_unpack_returns_what_pack_was_given_and_a_plan_has_the_same_sizes(name):
    weight = CASES[name]()
    kernel, problem = kernel_of(weight), problem_of(weight)
    packed, planned = kernel.pack(weight, problem), kernel.pack(on_meta(weight), problem)
    assert {key: (t.shape, t.dtype) for key, t in packed.items()} == {
        key: (t.shape, t.dtype) for key, t in planned.items()
    }
    unpacked = kernel.unpack(packed, problem)
    assert unpacked.type == weight.type
    assert unpacked.tensors().keys() == weight.tensors().keys()
    for key, tensor in weight.tensors().items():
        again = unpacked.tensors()[key]
        assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8)), key


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_table_is_the_dequantised_row_and_a_head_shares_its_bytes(name):
    weight = CASES[name]()
    linear = kernel_of(weight)
    kernel = {
        NativeInt4: NativeInt4Embedding,
        NativeInt8: NativeInt8Embedding,
        NativeFp4: NativeFp4Embedding,
        NativeIntegerCodebook: NativeIntegerCodebookEmbedding,
    }[type(linear)]()
    assert kernel.layout == linear.layout
    for dtype in FLOATS:
        problem = problem_of(weight, dtype)
        packed, table = kernel.pack(weight, problem), weight.dequantize(dtype)
        for ids in (torch.arange(weight.shape[0]), torch.tensor([[0, weight.shape[0] - 1]]), torch.tensor(0)):
            assert torch.equal(kernel.run(packed, problem, ids), table[ids])
        x = floats(3, weight.shape[1], dtype=dtype)
        assert torch.equal(
            linear.run(packed, problem, x, None), linear.run(linear.pack(weight, problem), problem, x, None)
        )
    for bad in (torch.tensor([weight.shape[0]]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="outside the table"):
            kernel.run(packed, problem, bad)


TABLES = {
    "int4": lambda table: IntWeight.from_float(table, bits=4, group_size=32, symmetric=False),
    "int8": lambda table: IntWeight.from_float(table, bits=8, group_size=128, symmetric=True),
    "fp8": lambda table: Fp8Weight.from_float(table, block=(1, 0), activations="float"),
    "bfloat16": lambda table: DenseWeight(table.bfloat16()),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tied_head_and_its_embedding_hold_one_copy(name, dtype):
    execution = Execution(dtype=dtype, device="cpu")
    embedding = bind(TABLES[name](floats(64, 128)), execution, "embedding")
    head = bind_shared(embedding, execution, "linear")
    assert head.packed is embedding.packed
    assert "reference" not in (head.selection.kernel.name, embedding.selection.kernel.name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("codes", (0, 255), ids=("lowest", "highest"))
@pytest.mark.parametrize("value", (1.0, -1.0), ids=("positive", "negative"))
def test_the_largest_products_do_not_overflow(path, codes, value):
    """Every code and every activation at an end of its range: pairs of products exceed 16 bits."""
    weight = IntWeight(torch.full((17, 256), codes, dtype=torch.uint8), torch.ones(17, 2), None, 8, 128)
    kernel, problem = NativeInt8(), problem_of(weight, path=path)
    for tokens in (1, 5):
        y = kernel.run(kernel.pack(weight, problem), problem, torch.full((tokens, 256), value), None)
        assert torch.allclose(y, torch.full((tokens, 17), value * (codes - 128.0) * 256), rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("code", (0, 15), ids=("lowest", "highest"))
def test_the_largest_products_of_a_codebook_do_not_overflow(path, code):
    weight = fp4((17, 256, 128), scales=torch.float32, codebook="iq4")
    weight = dataclasses.replace(weight, codes=torch.full_like(weight.codes, code))
    kernel, problem = NativeIntegerCodebook(), problem_of(weight, path=path)
    packed, value = kernel.pack(weight, problem), (-127.0, 113.0)[code // 15]
    for tokens in (1, 5):
        y = kernel.run(packed, problem, torch.full((tokens, 256), -1.0), None)
        assert torch.allclose(y, (-128 * value * weight.scales.sum(1)).expand(tokens, 17), rtol=1e-6)


def test_a_table_that_is_not_the_codebooks_own_is_refused():
    weight = fp4((17, 64, 32), scales=torch.float32, codebook="iq2")
    other = dataclasses.replace(weight, table=weight.table * 2)
    with pytest.raises(ValueError, match="must be that of iq2"):
        NativeIntegerCodebook().pack(other, problem_of(weight))
    assert "nf4" in str(
        NativeIntegerCodebook().why_not(problem_of(dataclasses.replace(weight, codebook="nf4")))
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ("int8-none-float32-65x256x128", "int4-offsets-float32-65x256x128", "mxfp4"))
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_a_token_that_is_not_finite_spoils_its_own_outputs_only(path, name, bad):
    weight = CASES[name]()
    kernel, problem = kernel_of(weight), problem_of(weight, path=path)
    packed, x = kernel.pack(weight, problem), floats(5, weight.shape[1])
    clean = kernel.run(packed, problem, x, None)
    x[1, 100] = bad
    y = kernel.run(packed, problem, x, None)
    assert bool(y[1].isnan().all())
    y[1] = clean[1]
    assert torch.equal(y, clean)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scales", (torch.float8_e4m3fn, torch.float8_e8m0fnu), ids=str)
def test_every_8_bit_scale_is_read_as_it_is(path, scales):
    codes = torch.arange(256, dtype=torch.uint8).view(scales)
    # Those of e4m3 have both signs; beyond 2^100 the sums of products leave float32 before their activations' scale.
    stored = codes[codes.float() < 2.0**100].view(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, 256 - stored.numel()))
    weight = dataclasses.replace(fp4((256, 32, 32), scales=scales), scales=stored.view(scales).unsqueeze(1))
    weight = dataclasses.replace(weight, codes=torch.full_like(weight.codes, 2))  # 1.0
    kernel, problem = NativeFp4(), problem_of(weight, path=path)
    packed, x = kernel.pack(weight, problem), torch.zeros(3, 32)
    x[:, 0] = 0.5
    expected = weight.scales.float().flatten() / 2
    for tokens in (1, 3):
        y = kernel.run(packed, problem, x[:tokens], None)
        assert torch.allclose(y, expected.expand(tokens, 256), rtol=1e-6, atol=0)
    nan = torch.full_like(stored, 255).view(scales).unsqueeze(1)
    with pytest.raises(ValueError, match="NaN"):
        kernel.pack(dataclasses.replace(weight, scales=nan), problem)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e30, 1e-20], ids=str)
def test_large_and_small_magnitudes(path, scale):
    for name in ("int8-each-float32-65x256x128", "nvfp4"):
        weight = CASES[name]()
        kernel, problem = kernel_of(weight), problem_of(weight, path=path)
        x = floats(3, weight.shape[1])
        x[:, 3] *= 1000
        y = kernel.run(kernel.pack(weight, problem), problem, x * scale, None)
        assert_close(y / scale, x, weight, None, exact=False, within=APART)


# --------------------------------------------------------------------------------------- activations as checkpoints ask


def codes_of(x, activations, group, static):
    """compressed-tensors' dynamic and static int8, written out: (codes, scales), each step rounded to x's dtype."""
    if activations == "static":
        scales = static.max().to(x.dtype).expand(x.shape[0], 1)
    elif activations == "tensor":
        scales = (x.abs().max() / 127.5).reshape(1, 1).expand(x.shape[0], 1)
    elif activations == "group":
        scales = (x.unflatten(-1, (-1, group)).abs().amax(-1) / 127.5).repeat_interleave(group, -1)
    else:
        scales = x.abs().amax(-1, keepdim=True) / 127.5
    scales = scales.clamp(min=torch.finfo(x.dtype).smallest_normal)
    return (x / scales).round().clamp(-128, 127), scales


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activations", ("token", "tensor", "group", "static"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", (8, 4))
def test_activations_become_the_codes_that_the_checkpoint_asks_for(path, activations, dtype, bits):
    shape = (50, 384, 64 if activations == "group" else 384)
    weight = dataclasses.replace(
        integers(bits, shape, zeros="each", scales=torch.float32),
        activations=activations,
        input_scales=torch.tensor([0.011, 0.017]) if activations == "static" else None,
    )
    kernel, problem = kernel_of(weight), problem_of(weight, dtype, path, "checkpoint")
    assert f"int8 ({activations})" in kernel.numerics(problem)
    if dtype is torch.float32:
        assert kernel.why_not(problem) is None
    else:  # right, but further from what the writers' own rounding of weights gives
        assert "keeps weights exact" in kernel.why_not(problem)
    packed, weight64 = kernel.pack(weight, problem), weight.dequantize(torch.float64)
    for tokens in (0, 1, 3, 40):
        x = floats(tokens, 384, dtype=dtype)
        if tokens == 3:
            x[1] = 0
        if tokens == 0:
            assert kernel.run(packed, problem, x, None).shape == (0, 50)
            continue
        codes, scales = codes_of(x, activations, 64, weight.input_scales)
        expected = (codes.double() * scales.double()) @ weight64.T
        # One code that falls the other way would be off by its scale times a weight, which is far more than this.
        bound = (codes.double() * scales.double()).abs() @ weight64.abs().T * 2**-20
        bound += expected.abs() * HALF_UNIT[dtype] + 1e-7
        assert ((kernel.run(packed, problem, x, None).double() - expected).abs() <= bound).all()


def test_a_token_that_is_not_finite_is_nan_under_the_demands_of_a_checkpoint_too():
    for activations in ("token", "static"):
        weight = dataclasses.replace(
            integers(8, (20, 128, 128)), activations=activations, input_scales=torch.tensor([0.02])
        )
        kernel, problem = NativeInt8(), problem_of(weight, compute="checkpoint")
        packed, x = kernel.pack(weight, problem), floats(3, 128)
        clean = kernel.run(packed, problem, x, None)
        x[1, 7] = float("nan")
        y = kernel.run(packed, problem, x, None)
        assert bool(y[1].isnan().all()) and torch.equal(y[[0, 2]], clean[[0, 2]])


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_threads_nor_on_what_is_batched(path, torch_threads):
    for weight in (
        integers(8, (331, 512, 128)),
        integers(4, (331, 1024, 32), zeros="offsets"),
        fp4((331, 1024, 32)),
        fp4((331, 512, 32), scales=torch.float32, codebook="iq4"),
    ):
        kernel, problem = kernel_of(weight), problem_of(weight, path=path)
        x, results = floats(203, weight.shape[1]), []
        for threads in (1, 2, 3):
            torch_threads(threads)
            packed = kernel.pack(weight, problem)
            results.append(
                [packed["blocks"], *(kernel.run(packed, problem, x[:m], None) for m in (1, 4, 203))]
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        whole = results[0][-1]
        for first, last in ((0, 5), (5, 10), (10, 17), (17, 60), (60, 203)):
            assert torch.equal(kernel.run(packed, problem, x[first:last], None), whole[first:last])


def test_several_python_threads_get_the_same_results(torch_threads):
    torch_threads(2)
    cases = []
    for weight, tokens in (
        (integers(8, (331, 512, 128)), 1),
        (fp4((331, 1024, 32)), 9),
        (integers(8, (50, 384, 64)), 40),
    ):
        kernel, problem = kernel_of(weight), problem_of(weight)
        packed, x = kernel.pack(weight, problem), floats(tokens, weight.shape[1])
        cases.append((kernel, packed, problem, x, kernel.run(packed, problem, x, None)))

    def repeat(start: int) -> bool:
        turns = (cases[(start + turn) % len(cases)] for turn in range(40))
        return all(
            torch.equal(kernel.run(packed, problem, x, None), y) for kernel, packed, problem, x, y in turns
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(8)))
