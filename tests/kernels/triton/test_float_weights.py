"""fp8 and fp4 weights and other codebooks on the GPU, activations left as they are."""

from dataclasses import replace

import pytest
import torch

from pymllm.kernels.canonical import CodebookWeight, Fp8Weight
from pymllm.kernels.codebooks import INTEGER_CODEBOOKS
from pymllm.kernels.triton.codebook_weights import TritonIntegerCodebook
from pymllm.kernels.triton.embedding import TritonIntegerCodebookEmbedding
from pymllm.kernels.triton.fp4_weights import TritonFp4
from pymllm.kernels.triton.fp8_weights import TritonFp8

from .gpu import FLOATS, HERE, moved, randn
from .linear_checks import check_products, check_round_trip, problem_for


@pytest.mark.parametrize("block", ((128, 128), (64, 32), (1, 0), (0, 0)), ids=str)
@pytest.mark.parametrize("in_features", (256, 208))
def test_fp8_products_equal_float64(block, in_features):
    """208 inputs: the last block of 128 is not whole."""
    weight = Fp8Weight.from_float(randn(70, in_features).cpu(), block=block, activations="float")
    for dtype in FLOATS:
        check_round_trip(TritonFp8(), weight, dtype)
        check_products(TritonFp8(), weight, dtype)


def all_codes(values):
    """Every code in every place of a word."""
    return values.repeat(16, 1) if values.shape[0] == 1 else values


def test_every_fp8_code_is_decoded_exactly_and_nan_stays_nan():
    codes = torch.arange(256, dtype=torch.uint8).repeat(16, 1)
    for row in range(16):
        codes[row] = codes[row].roll(row)
    weight = Fp8Weight(codes.view(torch.float8_e4m3fn), torch.ones(16, 1), (1, 0))
    expected = weight.dequantize(torch.float16)
    problem = problem_for(weight, torch.float16)
    packed = moved(TritonFp8().pack(weight, problem))
    for column in (0, 1, 77, 255):
        unit = torch.zeros(1, 256, dtype=torch.float16, device=HERE)
        unit[0, column] = 1
        result = TritonFp8().run(packed, problem, unit, None)
        assert result.isnan().all()  # each row has a NaN, and 0 * NaN is NaN
    finite = weight.weight.view(torch.uint8).masked_fill((codes & 127) == 127, 0)
    weight = Fp8Weight(finite.view(torch.float8_e4m3fn), torch.ones(16, 1), (1, 0))
    packed = moved(TritonFp8().pack(weight, problem))
    eye = torch.eye(256, dtype=torch.float16, device=HERE)
    for rows in (eye, eye[:1], eye[200:203]):
        result = TritonFp8().run(packed, problem, rows, None)
        assert torch.equal(result.t().cpu(), weight.dequantize(torch.float16) @ rows.t().cpu())
    assert expected.isnan().any()


def codebook(scales, group, in_features, row_scales, out_features=70, seed=0, name="e2m1"):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    shape = (out_features, in_features // group)
    if scales is torch.float8_e8m0fnu:
        stored = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8).view(scales)
    else:
        stored = (torch.rand(shape, generator=generator) + 0.1).to(scales)
    rows = torch.rand(out_features, generator=generator) + 0.5 if row_scales else None
    return CodebookWeight(codes, torch.tensor(INTEGER_CODEBOOKS[name].values), stored, name, group, rows)


@pytest.mark.parametrize(
    "scales, group, row_scales",
    ((torch.float8_e8m0fnu, 32, False), (torch.float8_e4m3fn, 16, True), (torch.float16, 64, False)),
    ids=("mxfp4", "nvfp4", "float16"),
)
def test_fp4_products_equal_float64(scales, group, row_scales):
    weight = codebook(scales, group, 320, row_scales)
    for dtype in FLOATS:
        check_round_trip(TritonFp4(), weight, dtype)
        check_products(TritonFp4(), weight, dtype)


OTHERS = tuple(name for name in INTEGER_CODEBOOKS if name != "e2m1")


@pytest.mark.parametrize("name", OTHERS)
def test_every_code_of_a_codebook_is_decoded_exactly(name):
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 2)
    for row in range(16):
        codes[row] = codes[row].roll(row)
    table = torch.tensor(INTEGER_CODEBOOKS[name].values)
    weight = CodebookWeight(codes, table, torch.full((16, 1), 0.5), name, 32)
    problem = problem_for(weight, torch.float16)
    packed = moved(TritonIntegerCodebook().pack(weight, problem))
    eye = torch.eye(32, dtype=torch.float16, device=HERE)
    for rows in (eye, eye[:1], eye[20:23]):
        result = TritonIntegerCodebook().run(packed, problem, rows, None)
        assert torch.equal(result.t().cpu(), weight.dequantize(torch.float16) @ rows.t().cpu())
    ids = torch.tensor([3, 0, 15], device=HERE)
    rows = TritonIntegerCodebookEmbedding().run(packed, problem, ids)
    assert torch.equal(rows.cpu(), weight.dequantize(torch.float16)[ids.cpu()])


@pytest.mark.parametrize("name, scales, group", (("iq4", torch.float32, 32), ("iq2", torch.float16, 16)))
def test_products_of_a_codebook_equal_float64(name, scales, group):
    weight = codebook(scales, group, 320, False, name=name)
    for dtype in FLOATS:
        check_round_trip(TritonIntegerCodebook(), weight, dtype)
        check_products(TritonIntegerCodebook(), weight, dtype, magnitude=0.1)


def test_the_other_codebooks_are_refused():
    weight = codebook(torch.float16, 64, 320, False)
    problem = problem_for(replace(weight, codebook="nf4"), torch.bfloat16)
    assert "e2m1" in (TritonFp4().why_not(problem) or "")
    assert "iq4" in (TritonIntegerCodebook().why_not(problem) or "")
