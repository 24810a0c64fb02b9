"""RMSNorm and the gated activations, against transformers and float64 formulas."""

import contextlib

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pymllm.config import Execution
from pymllm.kernels.gated_activation import ACTIVATIONS, activation_of
from pymllm.layers.activation import GeluAndMul, SiluAndMul
from pymllm.layers.layernorm import GemmaRMSNorm, RMSNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((0, 48), (1, 48), (5, 48), (2, 3, 48), (48,))


def random(shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", (1.0, 1e-3, 1e4), ids=("ordinary", "small", "large"))
def test_rmsnorm_equals_transformers(dtype, shape, scale):
    ours, theirs = RMSNorm(48, 1e-5, params_dtype=dtype), LlamaRMSNorm(48, 1e-5).to(dtype)
    weight = random((48,), dtype, seed=1)
    ours.weight.data.copy_(weight)
    theirs.weight.data.copy_(weight)
    x = random(shape, dtype, scale)
    result = ours(x)
    assert result.dtype is dtype and result.shape == x.shape
    # The same roundings in the same places; the mean may be summed in another order.
    assert torch.allclose(result.float(), theirs(x).float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rmsnorm_with_a_residual_returns_the_normed_sum_and_the_sum(dtype):
    norm = RMSNorm(48, params_dtype=dtype)
    norm.weight.data.copy_(random((48,), dtype, seed=1))
    x, residual = random((5, 48), dtype), random((5, 48), dtype, seed=2)
    before = x.clone(), residual.clone()
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual) and torch.equal(normed, norm(x + residual))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1]), "inputs are left alone"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("under", (True, False), ids=("in a model", "alone"))
def test_gemmas_norm_multiplies_by_one_more_than_its_weight_before_it_rounds(dtype, under):
    with Execution(dtype=dtype) if under else contextlib.nullcontext():
        ours = GemmaRMSNorm(48, 1e-5)
    theirs = Gemma2RMSNorm(48, 1e-5)
    x, residual = random((5, 48), dtype), random((5, 48), dtype, seed=2)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}  # rounded once: the last bit alone may differ
    assert torch.allclose(ours(x).float(), theirs(x).float(), **close), "a fresh norm multiplies by one"
    weight = random((48,), scale=0.3, seed=1)
    ours.weight.data.copy_(weight)  # as a checkpoint has it
    ours.finish()
    theirs.weight.data.copy_(weight)
    normed, total = ours(x, residual)
    assert normed.dtype is total.dtype is dtype
    assert torch.equal(total, x + residual)
    assert torch.allclose(normed.float(), theirs(total).float(), **close)


def test_rmsnorm_without_a_weight_and_the_default_epsilon():
    norm = RMSNorm(48, has_weight=False)
    assert norm.weight is None and norm.eps == 1e-6 and not list(norm.parameters())
    x = random((3, 48))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x).double(), exact, rtol=1e-6)


def test_rmsnorm_does_not_overflow_in_float16():
    x = torch.full((1, 48), 6e4, dtype=torch.float16)
    assert torch.equal(RMSNorm(48, params_dtype=torch.float16)(x), torch.ones_like(x))


def test_rmsnorm_takes_the_dtype_of_the_execution_it_is_built_under():
    with Execution(dtype=torch.bfloat16):
        assert RMSNorm(8).weight.dtype is torch.bfloat16
    assert RMSNorm(8).weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_activations_equal_their_formulas(dtype, shape):
    x = random(shape, dtype, 3.0)
    gate, up = (half.double() for half in (x[..., :24], x[..., 24:]))
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    expected = {SiluAndMul: gate / (1 + (-gate).exp()) * up, GeluAndMul: gate / 2 * (1 + inner.tanh()) * up}
    for activation, exact in expected.items():
        result = activation()(x)
        assert result.dtype is dtype and result.shape == exact.shape
        # Rounded after the activation and after the product.
        tolerance = 4 * torch.finfo(dtype).eps
        assert torch.allclose(result.double(), exact, rtol=tolerance, atol=tolerance)


def test_gated_activations_of_large_values_stay_finite():
    x = torch.tensor([[-1e4, 1e4, 2.0, 3.0]])
    assert SiluAndMul()(x).tolist() == [[0.0, 3e4]] and GeluAndMul()(x).tolist() == [[0.0, 3e4]]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() & ACT2FN.keys()))
def test_activations_are_those_that_transformers_calls_so(name):
    gate, up = torch.linspace(-6, 6, 501), torch.linspace(1, 2, 501)
    assert torch.allclose(activation_of(name)(torch.cat((gate, up))), ACT2FN[name](gate) * up, atol=1e-6)
