"""8-bit weights and activations on the GPU."""

import pytest
import torch

from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.canonical import Fp8Weight, IntWeight
from pymllm.kernels.triton.eight_bit import Groups, TritonFp8Activations, TritonInt8Activations, quantise

from .gpu import FLOATS, HERE, UNIT, moved, randn
from .linear_checks import check_round_trip, problem_for

FP8 = [
    ((128, 128), "group"),
    ((128, 128), "token"),
    ((1, 0), "token"),
    ((0, 0), "static"),
    ((0, 0), "tensor"),
]
INT8 = [(384, True, "token"), (384, False, "static"), (64, False, "group"), (64, True, "token")]


def fp8_weight(block, activations, in_features=384):
    weight = Fp8Weight.from_float(randn(70, in_features).cpu(), block=block, activations=activations)
    static = torch.tensor([0.01, 0.011]) if activations == "static" else None
    return Fp8Weight(weight.weight, weight.scales, block, activations, static)


def int8_weight(group, symmetric, activations):
    made = IntWeight.from_float(randn(70, 384).cpu(), bits=8, group_size=group, symmetric=symmetric)
    static = torch.tensor([0.03]) if activations == "static" else None
    return IntWeight(
        made.codes, made.scales, made.zeros, 8, group, activations=activations, input_scales=static
    )


CASES = [(TritonFp8Activations(), fp8_weight(*case)) for case in FP8]
CASES += [(TritonFp8Activations(), fp8_weight((128, 128), "group", 208))]
CASES += [(TritonInt8Activations(), int8_weight(*case)) for case in INT8]


@pytest.mark.parametrize("kernel, weight", CASES, ids=lambda value: str(getattr(value, "type", "")))
def test_products_equal_float64_over_the_codes_that_the_reference_gives(kernel, weight):
    exact = weight.dequantize(torch.float64).to(HERE)
    for dtype in FLOATS:
        check_round_trip(kernel, weight, dtype)
        problem = problem_for(weight, dtype)
        assert kernel.why_not(problem) is None
        packed = moved(kernel.pack(weight, problem))
        bias = randn(70, seed=1, dtype=dtype)
        for tokens in (0, 1, 70):
            x = randn(tokens, weight.shape[1], seed=tokens, dtype=dtype)
            seen = quantise_activations(x, weight.type, packed.get("input_scales")).double()
            result = kernel.run(packed, problem, x, bias)
            expected = seen @ exact.t() + bias.double()
            # `seen` is codes times scale, rounded to the dtype; the result is rounded too.
            bound = UNIT[dtype] * (
                seen.abs() @ exact.t().abs() + 2 * expected.abs() + 2 * bias.double().abs()
            )
            assert result.dtype is dtype and result.shape == expected.shape
            assert not tokens or ((result.double() - expected).abs() - bound).max() <= 0, (dtype, tokens)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("integer", (False, True), ids=("fp8", "int8"))
def test_codes_and_scales_are_those_of_the_reference_bit_for_bit(integer, dtype):
    kind = (int8_weight(384, True, "token") if integer else fp8_weight((1, 0), "token")).type
    x = torch.cat((randn(5, 384), torch.zeros(1, 384, device=HERE), randn(1, 384) * 1e3)).to(dtype)
    codes, scales = quantise(x, Groups(integer, 1 << 30, 1 << 30, 1), "token", None)
    assert torch.equal((codes.float() * scales).to(dtype), quantise_activations(x, kind, None))


def test_every_fp8_code_survives_quantising_with_a_scale_of_one():
    finite = [code for code in range(256) if code & 127 != 127]
    values = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).half()[None].to(HERE)
    codes, scales = quantise(values, Groups(False, 1 << 30, 1 << 30, 1), "token", None)
    assert float(scales) == 1.0
    assert torch.equal(codes.half(), values)


def test_what_a_checkpoint_or_the_user_does_not_allow_is_refused():
    weight = fp8_weight((1, 0), "token")
    kernel = TritonFp8Activations()
    assert "exact" in (kernel.why_not(problem_for(weight, torch.bfloat16, "exact")) or "")
    floats = Fp8Weight(weight.weight, weight.scales, (1, 0), "float")
    assert "asks for float" in (kernel.why_not(problem_for(floats, torch.bfloat16)) or "")
