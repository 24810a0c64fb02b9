"""Products of fp8 by fp8 that torch makes on a GPU: how it is asked, and what happens where it refuses."""

# T tokens, O out_features, I in_features

import itertools
import logging

import pytest
import torch

from pymllm.kernels import scaled_mm
from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.aten.scaled_mm import TorchScaledMM
from pymllm.kernels.canonical import Fp8Weight
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.quantised_rows import QuantisedRows
from pymllm.kernels.triton import eight_bit
from pymllm.kernels.triton.eight_bit import TritonFp8Activations
from pymllm.kernels.triton.eight_bit_kernels import quantise_rows

from ..scaled_mm_checks import ScaledMM, kind_of
from .gpu import UNIT, randn

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
SM90 = probe_device("cuda:sm90")
TAKEN = {
    ((0, 0), "static"): "tensor",
    ((0, 0), "tensor"): "tensor",
    ((0, 0), "token"): "row",
    ((1, 0), "static"): "row",
    ((1, 0), "tensor"): "row",
    ((1, 0), "token"): "row",
    ((128, 128), "group"): "block",
}
LEFT = [
    ((128, 128), "token"),
    ((128, 128), "static"),
    ((64, 128), "group"),
    ((128, 0), "token"),
    ((1, 128), "group"),
]


@pytest.fixture
def torch_mm(monkeypatch):
    """Tensors here count as on a GPU, and torch multiplies as on one."""
    found = ScaledMM()
    monkeypatch.setattr(torch, "_scaled_mm", found)
    monkeypatch.setattr(eight_bit, "_on_gpu", lambda codes: True)
    monkeypatch.setattr(scaled_mm, "_refused", set())
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(quantise_rows, "launch", quantised_by_torch)
    return found


def quantised_by_torch(grid, x, static, codes, scales, in_features, x_stride, scale_stride, **constants):
    """What `quantise_rows` does, for many rows in little time: the interpreter takes a millisecond for each."""
    side = min(constants["GROUP"], in_features)
    tiles = x.float().unflatten(1, (-1, side))
    peaks = (
        tiles.abs().amax(-1) / constants["LARGEST"] if static is None else static.float().expand(scales.shape)
    )
    made = peaks.to(x.dtype).float().clamp(min=constants["SMALLEST"])
    assert scales.stride() == (1, scale_stride) and x_stride == x.stride(0)
    scales.copy_(made)
    values = (tiles / made.unsqueeze(-1)).to(x.dtype).float().clamp(-448, 448).flatten(1)
    codes.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))


def make(block, activations, out_features, in_features):
    made = Fp8Weight.from_float(randn(out_features, in_features), block=block, activations=activations)
    static = torch.tensor([0.01, 0.011]) if activations == "static" else None
    return Fp8Weight(made.weight, made.scales, block, activations, static)


def problem_of(weight, dtype, device=SM90):
    out_features, in_features = weight.shape
    return LinearProblem(weight.type, in_features, out_features, dtype, device)


def close(result, weight, x, bias, packed):
    """Compare with float64 over the codes that the reference gives to x."""
    exact, dtype = weight.dequantize(torch.float64), x.dtype
    seen = quantise_activations(x, weight.type, packed.get("input_scales")).double()
    expected = seen @ exact.t() + (0 if bias is None else bias.double())
    bound = UNIT[dtype] * (seen.abs() @ exact.t().abs() + 2 * expected.abs() + 1e-6)
    bound = bound if bias is None else bound + 2 * UNIT[dtype] * bias.double().abs()
    assert result.dtype is dtype and result.shape == expected.shape
    return bool(((result.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_torch_gets_operands_that_it_takes_and_gives_the_product(case, dtype, torch_mm):
    for (out_features, in_features), tokens in itertools.product(
        ((208, 512), (64, 1024)), (128, 129, 200, 2048)
    ):
        weight = make(*case, out_features, in_features)
        problem, kernel = problem_of(weight, dtype), TritonFp8Activations()
        packed = kernel.pack(weight, problem)
        for name, tensor in weight.tensors().items():
            again = kernel.unpack(packed, problem).tensors()[name]
            assert again.shape == tensor.shape and torch.equal(
                again.view(torch.uint8), tensor.view(torch.uint8)
            )
        wide = randn(tokens, 2 * in_features, seed=tokens, dtype=dtype)
        bias = randn(out_features + 1, seed=1)[1:]  # float32, and not aligned
        for x, b in (
            (wide[:, :in_features], None),
            (wide[:, ::2], bias.to(dtype)),
            (wide[:, in_features:], bias),
        ):
            before = len(torch_mm.kinds)
            result = kernel.run(packed, problem, x, b)
            assert torch_mm.kinds[before:] == [TAKEN[case]]
            assert close(result, weight, x, b, packed), (tokens, out_features)


@pytest.mark.parametrize(
    "block, activations", [case for case in TAKEN if case[1] in ("token", "group")], ids=str
)
@pytest.mark.parametrize("spare", (True, False), ids=("spare rows", "no spare rows"))
def test_rows_that_a_norm_has_quantised_reach_torch_too(block, activations, spare, torch_mm):
    weight = make(block, activations, 64, 512)
    problem, kernel = problem_of(weight, torch.bfloat16), TritonFp8Activations()
    packed = kernel.pack(weight, problem)
    groups = kernel.groups(problem)
    x = randn(3, 47, 512, dtype=torch.bfloat16)
    codes, scales = eight_bit.quantise(x.flatten(0, 1), groups, activations, None)
    if not spare:
        codes, scales = codes.clone(), scales.contiguous()
    result = kernel.run(packed, problem, QuantisedRows(codes.view(3, 47, 512), scales, x.dtype), None)
    assert len(torch_mm.kinds) == 1 and close(result, weight, x, None, packed)


@pytest.mark.parametrize("case", LEFT, ids=str)
def test_scales_that_torch_does_not_take_are_left_to_our_kernel(case, torch_mm):
    weight = make(*case, 64, 128)
    problem, kernel = problem_of(weight, torch.bfloat16), TritonFp8Activations()
    packed = kernel.pack(weight, problem)
    x = randn(128, 128, dtype=torch.bfloat16)
    assert close(kernel.run(packed, problem, x, None), weight, x, None, packed)
    assert not torch_mm.kinds and "_scaled_mm" not in kernel.numerics(problem)


@pytest.mark.parametrize(
    "tokens, out_features, in_features", ((127, 64, 512), (128, 72, 512), (128, 64, 384), (0, 64, 512))
)
def test_fewer_rows_and_odd_shapes_are_left_to_our_kernel(tokens, out_features, in_features, torch_mm):
    weight = make((128, 128), "group", out_features, in_features)
    problem, kernel = problem_of(weight, torch.bfloat16), TritonFp8Activations()
    packed = kernel.pack(weight, problem)
    x = randn(tokens, in_features, dtype=torch.bfloat16)
    assert close(kernel.run(packed, problem, x, None), weight, x, None, packed)
    assert not torch_mm.kinds


@pytest.mark.parametrize(
    "error", (RuntimeError("not supported\nbecause"), ValueError("no"), NotImplementedError("no"))
)
def test_a_refusal_is_said_once_and_our_kernel_multiplies_from_then_on(error, torch_mm, caplog):
    torch_mm.error = error
    kernel = TritonFp8Activations()
    with caplog.at_level(logging.WARNING, "pymllm"):
        for block, activations in (((1, 0), "token"), ((1, 0), "token"), ((128, 128), "group")):
            weight = make(block, activations, 16, 512)
            problem = problem_of(weight, torch.bfloat16)
            packed, x = kernel.pack(weight, problem), randn(128, 512, dtype=torch.bfloat16)
            assert close(kernel.run(packed, problem, x, None), weight, x, None, packed)
    assert torch_mm.kinds == ["row", "block"]  # the second product by rows did not ask again
    first, second = (record.getMessage() for record in caplog.records)
    assert "by row" in first and str(error).partition("\n")[0] in first and "because" not in first
    assert "by block" in second


@pytest.mark.parametrize(
    "error", (torch.OutOfMemoryError("no memory"), torch.AcceleratorError("illegal address"))
)
def test_faults_of_the_device_are_no_refusals(error, torch_mm):
    torch_mm.error = error
    weight = make((1, 0), "token", 16, 512)
    problem, kernel = problem_of(weight, torch.bfloat16), TritonFp8Activations()
    with pytest.raises(type(error)):
        kernel.run(kernel.pack(weight, problem), problem, randn(128, 512, dtype=torch.bfloat16), None)
    assert not scaled_mm._refused


def test_a_weight_that_is_not_aligned_is_left_to_our_kernel_without_a_word(torch_mm, caplog):
    weight = make((1, 0), "token", 16, 512)
    problem, kernel = problem_of(weight, torch.bfloat16), TritonFp8Activations()
    packed = dict(kernel.pack(weight, problem))
    within = torch.empty(16 * 512 + 8, dtype=torch.float8_e4m3fn)[8:].view(16, 512)
    packed["weight"] = within.copy_(packed["weight"])
    x = randn(128, 512, dtype=torch.bfloat16)
    assert close(kernel.run(packed, problem, x, None), weight, x, None, packed)
    assert not torch_mm.kinds and not caplog.records and not scaled_mm._refused


def test_which_gpus_and_versions_multiply_blocks(monkeypatch):
    def said(device, cuda="12.9", in_features=512, dtype=torch.bfloat16, scaling="block"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return scaled_mm.why_not_scaled_mm(scaling, probe_device(device), 64, in_features, dtype)

    assert said("cuda:sm90") is None and said("cuda:sm90", "13.0") is None and said("cuda:sm90", None) is None
    assert said("cuda:sm90", "12.8") == "multiplies blocks from CUDA 12.9 on, torch is built for 12.8"
    assert "512 inputs, the weight has 640" in said("cuda:sm90", in_features=640)
    for device in ("cuda:sm89", "cuda:sm100", "cuda:sm120", "hip:gfx950"):
        assert "compute capability 9" in said(device)
        assert said(device, "12.4", scaling="row") is None
    assert "float8" in said("cuda:sm80", scaling="tensor")
    assert "bfloat16" in said("hip:gfx950", dtype=torch.float16, scaling="row")
    assert "float32" in said("cuda:sm90", dtype=torch.float32)


def test_plans_say_from_which_row_on_torch_multiplies():
    kernel = TritonFp8Activations()
    for case, device, taken in (
        (((128, 128), "group"), "cuda:sm90", True),
        (((128, 128), "group"), "cuda:sm100", False),
        (((0, 0), "static"), "cuda:sm89", True),
    ):
        numerics = kernel.numerics(problem_of(make(*case, 64, 512), torch.bfloat16, probe_device(device)))
        assert ("from 128 rows on torch's _scaled_mm" in numerics) is taken


@pytest.mark.parametrize("refuses", (False, True))
def test_the_kernel_of_torch_alone_takes_any_rows_and_survives_a_refusal(refuses, torch_mm):
    torch_mm.error = RuntimeError("no") if refuses else None
    kernel = TorchScaledMM()
    for dtype in (torch.bfloat16, torch.float16):
        weight = make((1, 0), "token", 64, 512)
        problem = problem_of(weight, dtype)
        assert kernel.why_not(problem) is None
        packed = kernel.pack(weight, problem)
        bias = randn(64, seed=1)
        for x in (randn(512, 130, dtype=dtype).t(), randn(1, 512, dtype=dtype), randn(0, 512, dtype=dtype)):
            result = kernel.run(packed, problem, x, bias)
            expected = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
            assert result.shape == expected.shape and result.dtype is dtype
            assert not len(x) or float((result.double() - expected).norm() / expected.norm()) < 5e-2
    assert len(torch_mm.kinds) == (2 if refuses else 4)


def test_the_stand_in_refuses_what_torch_refuses():
    """The scales that this kernel once gave: one number, expanded."""
    a, b = torch.zeros(128, 256, dtype=torch.float8_e4m3fn), torch.zeros(256, 64, dtype=torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="Invalid scaling"):
        kind_of(a, b.t().contiguous().t(), torch.ones(128, 1), torch.ones(1, 1).expand(1, 64))
    with pytest.raises(RuntimeError, match="contiguous"):
        ScaledMM()(
            a,
            b.t().contiguous().t(),
            scale_a=torch.ones(128, 1),
            scale_b=torch.ones(1, 1).expand(1, 64),
            out_dtype=torch.bfloat16,
        )
