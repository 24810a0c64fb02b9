"""GPTQ and AWQ's searches against plain float64 references, on inputs with strong channels.

Legend: N rows of inputs, O out_features, I in_features, G group_size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import IntWeight
from pymllm.quantization.formats.fp8 import Fp8LinearMethod
from pymllm.quantization.formats.integer import IntegerLinearMethod
from pymllm.quantization.rounding.awq import grams_of, round_with_clipping, search_scales
from pymllm.quantization.rounding.calibrated import InputStatistics, quantize_calibrated
from pymllm.quantization.rounding.gptq import round_with_hessian
from pymllm.weights.spec import LinearShape, Span

N, O, I = 300, 24, 128


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """[N, I]: few directions and some channels that are twenty times as large."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn((20, I), generator=generator)
    x = torch.randn((N, 20), generator=generator) @ basis + 0.3 * torch.randn((N, I), generator=generator)
    x[:, ::17] *= 20
    return x


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn((O, I), generator=torch.Generator().manual_seed(1))


def output_error(made: IntWeight, weight: Tensor, inputs: Tensor) -> float:
    change = made.dequantize(torch.float64) - weight.double()
    return float((inputs.double() @ change.t()).square().mean())


def plain(weight: Tensor, group_size: int, symmetric: bool) -> IntWeight:
    return IntWeight.from_float(weight, bits=4, group_size=group_size, symmetric=symmetric)


def gptq_reference(weight: Tensor, gram: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Tensor:
    """Codes [O, I] by the definition: after each rounding, the inverse Hessian loses that input by elimination."""
    hessian = gram.double() + torch.eye(I).double() * 0.01 * gram.double().diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    left, codes = weight.double().clone(), torch.zeros(O, I, dtype=torch.int64)
    for index in order.tolist():
        group = index * scales.shape[1] // I
        scale, zero = scales[:, group].double(), zeros[:, group].double()
        codes[:, index] = ((left[:, index] / scale).round() + zero).clamp(0, 15).long()
        error = (left[:, index] - (codes[:, index] - zero) * scale) / inverse[index, index]
        left -= torch.outer(error, inverse[index])
        inverse = inverse - torch.outer(inverse[:, index], inverse[index]) / inverse[index, index]
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_in_act_order_is_the_elimination_written_out(weight, inputs, symmetric):
    gram = inputs.t() @ inputs
    made = round_with_hessian(weight, gram, bits=4, group_size=32, symmetric=symmetric, act_order=True)
    grid = plain(weight, 32, symmetric)
    assert torch.equal(made.scales, grid.scales)  # groups and their scales stay where they were
    zeros = torch.full_like(grid.scales, 8) if grid.zeros is None else grid.zeros
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    expected = gptq_reference(weight, gram, grid.scales, zeros, order)
    # float32 against float64: a value that lies between two codes may go either way, and moves what follows.
    assert (made.codes.long() != expected).float().mean() < 0.02


def test_gptq_of_one_group_a_row_is_the_elimination_in_order(weight, inputs):
    gram = inputs.t() @ inputs
    made = round_with_hessian(weight, gram, bits=4, group_size=I, symmetric=False)
    grid = plain(weight, I, False)
    expected = gptq_reference(weight, gram, grid.scales, grid.zeros, torch.arange(I))
    assert (made.codes.long() != expected).float().mean() < 0.02


@pytest.mark.parametrize("group_size", [16, 32, 64, I])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_halves_the_error_of_outputs(weight, inputs, group_size, act_order, symmetric):
    gram = inputs.t() @ inputs
    options = {"bits": 4, "group_size": group_size, "symmetric": symmetric, "act_order": act_order}
    made = round_with_hessian(weight, gram, **options)
    rounded = plain(weight, group_size, symmetric)
    assert made.type == rounded.type and made.shape == rounded.shape
    assert output_error(made, weight, inputs) < 0.5 * output_error(rounded, weight, inputs)


def test_gptq_with_independent_inputs_is_rounding_to_nearest(weight):
    made = round_with_hessian(weight, torch.eye(I) * 7, bits=4, group_size=32, symmetric=False)
    assert torch.equal(made.codes, plain(weight, 32, False).codes)
    unseen = round_with_hessian(weight, torch.zeros(I, I), bits=4, group_size=32, symmetric=False)
    assert torch.equal(unseen.codes, plain(weight, 32, False).codes)


def test_gptq_refuses_inputs_that_are_not_finite(weight):
    gram = torch.eye(I)
    gram[3, 3] = float("nan")
    with pytest.raises(ConfigError, match=r"a\.b.*not finite"):
        round_with_hessian(weight, gram, bits=4, group_size=32, symmetric=False, name="a.b")


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_is_the_best_of_the_ranges_for_every_group(weight, inputs, symmetric):
    made = round_with_clipping(weight, grams_of(inputs, 32), bits=4, group_size=32, symmetric=symmetric)
    errors = []
    for step_low in range(6):
        for step_high in range(6):
            if symmetric and step_low != step_high:
                continue
            factors = (1 - step_low / 16, 1 - step_high / 16)
            tried = IntWeight.from_float(
                weight, bits=4, group_size=32, symmetric=symmetric, range_factors=factors
            )
            errors.append(group_errors(tried, weight, inputs))
    found = group_errors(made, weight, inputs)
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-3, atol=1e-6)


def group_errors(made: IntWeight, weight: Tensor, inputs: Tensor) -> Tensor:
    """[O, I/G] float64: what each group alone changes of its output."""
    change = (made.dequantize(torch.float64) - weight.double()).unflatten(1, (-1, 32))
    return torch.einsum("ngi,ogi->nog", inputs.double().unflatten(1, (-1, 32)), change).square().sum(0)


def test_scales_found_lower_the_error_and_leave_the_weights_alone(weight, inputs):
    layer = weight.clone()

    def rounded(w: Tensor) -> Tensor:
        return plain(w, 32, False).dequantize(torch.float32)

    scales = search_scales([layer], inputs, lambda: inputs @ layer.t(), [rounded], 32)
    assert torch.equal(layer, weight)
    scaled = (rounded(weight * scales) / scales - weight).double()
    error = float((inputs.double() @ scaled.t()).square().mean())
    assert error < 0.7 * output_error(plain(weight, 32, False), weight, inputs)


def test_statistics_add_up_over_batches_and_dtypes(inputs):
    whole, parts = (InputStatistics(I, gram=True) for _ in range(2))
    whole.add(inputs)
    parts.add(inputs[:100].view(4, 25, I))
    parts.add(inputs[100:].double())
    parts.add(inputs[:0])
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-4, atol=0.1)  # of 1e5: the order of sums
    assert parts.rows == whole.rows == N and parts.peak == whole.peak == float(inputs.abs().max())
    torch.testing.assert_close(whole.grams(32), grams_of(inputs, 32))


@pytest.mark.parametrize(
    ("method", "largest"),
    [
        (IntegerLinearMethod(8, -1, True, activations="static"), 127.5),
        (Fp8LinearMethod((1, 0), "static"), 448.0),
    ],
)
def test_static_scales_take_the_largest_input_to_the_largest_code(weight, inputs, method, largest):
    shape = LinearShape(Span.full(I), (Span.full(O),), ("a.b",), torch.float32)
    statistics = InputStatistics(I, gram=True)
    with pytest.raises(ConfigError, match=r"a\.b.*zero"):
        quantize_calibrated(method, weight, shape, statistics, algorithm="gptq")
    statistics.add(inputs)
    made = quantize_calibrated(method, weight, shape, statistics, algorithm="gptq")
    assert made.activations == "static"
    assert made.input_scales.tolist() == pytest.approx([float(inputs.abs().max()) / largest])
    with pytest.raises(ConfigError, match="example inputs"):
        method.quantize(weight, shape)
