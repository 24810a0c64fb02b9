"""Norms and gates that leave codes for 8-bit products: those that the products would have made of floats."""

# T tokens, H hidden size, N half the gated size, G inputs that share a scale

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pymllm.config import Execution
from pymllm.kernels.canonical import Fp8Weight, IntWeight
from pymllm.kernels.quantised_rows import QuantisedRows, RowCodes
from pymllm.kernels.registry import KERNELS, kernels_for, select
from pymllm.kernels.triton.eight_bit import WHOLE, Groups, quantise
from pymllm.kernels.triton.elementwise import TritonElementwise
from pymllm.kernels.triton.launch import recording
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.linear import QKVParallelLinear
from pymllm.layers.mlp import GatedMLP
from pymllm.models.causal_lm import DecoderLayer
from pymllm.quantization.binding import bind_layer
from pymllm.quantization.formats.fp8 import Fp8LinearMethod

from .gpu import DEVICE, FLOATS, HERE, UNIT, moved, randn
from .linear_checks import problem_for
from .test_float_weights import Fp8Weight as MadeFp8

OURS = TritonElementwise()
CODES = {
    "int8": RowCodes(True),
    "int8 g32": RowCodes(True, 32),
    "fp8": RowCodes(False),
    "fp8 g128": RowCodes(False, 128),
}


def same(found, floats, codes):
    """That `found` is what `quantise` makes of `floats`."""
    assert isinstance(found, QuantisedRows) and found.dtype is floats.dtype
    assert found.codes.shape == floats.shape
    groups = Groups(codes.integer, codes.group or WHOLE, WHOLE, 1)
    rows = floats.reshape(-1, floats.shape[-1])
    expected, scales = quantise(rows, groups, "group" if codes.group else "token", None)
    if HERE.type == "cpu":
        assert torch.equal(found.scales, scales)
        assert torch.equal(found.codes.reshape(rows.shape).view(torch.uint8), expected.view(torch.uint8))
    else:  # sums in another order may round a value, and so a scale or a code, to its neighbour
        side = codes.group or rows.shape[1]
        wide = [s.repeat_interleave(side, 1)[:, : rows.shape[1]] for s in (found.scales, scales)]
        values = [
            c.reshape(rows.shape).float() * s for c, s in zip((found.codes, expected), wide, strict=True)
        ]
        step = wide[1] if codes.integer else values[1].abs() / 8 + wide[1] / 512
        assert bool(((values[0] - values[1]).abs() <= step * 1.01).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("size", (256, 1000, 40))
def test_codes_of_norms_are_those_of_the_norm_s_result(codes, size, dtype):
    x, residual = randn(3, 2 * size, dtype=dtype)[:, :size], randn(3, size, seed=1, dtype=dtype)
    for weight in (None, randn(size, seed=2, dtype=dtype), randn(size, seed=2)):
        same(OURS.rms_norm(x, weight, 1e-6, None, codes), OURS.rms_norm(x, weight, 1e-6), codes)
        found, total = OURS.rms_norm(x, weight, 1e-6, residual, codes)
        expected, sums = OURS.rms_norm(x, weight, 1e-6, residual)
        assert torch.equal(total, sums)
        same(found, expected, codes)


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
@pytest.mark.parametrize("activation", ("silu_and_mul", "gelu_and_mul"))
def test_codes_of_gates_are_those_of_the_gate_s_result(activation, codes):
    gate = getattr(OURS, activation)
    for shape in ((2, 2, 2 * 300), (1, 64)):
        x = randn(*shape, dtype=torch.bfloat16) * 3
        same(gate(x, codes), gate(x), codes)
    empty = gate(x[:0], codes)
    assert empty.codes.shape == (0, 32) and empty.scales.shape[0] == 0


@pytest.mark.parametrize("dtype", (*FLOATS, torch.float32), ids=str)
def test_gelu_equals_float64(dtype):
    x = randn(5, 2 * 70, dtype=dtype) * 3
    x[0, :4] = torch.tensor([-1e4, 1e3, -20.0, 0.0])
    gate, up = x.double().chunk(2, -1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    error = (OURS.gelu_and_mul(x).double() - expected).abs()
    # Far below zero the exact value is a difference of near ones, in float64 as in float32.
    assert bool((error <= 3 * UNIT.get(dtype, 2.0**-22) * expected.abs() + 2e-6).all())


@pytest.mark.parametrize("name", ("rms_norm", "silu_and_mul", "gelu_and_mul", "rotate"))
def test_every_set_of_elementwise_kernels_has_every_function(name):
    for path, kernel in zip(KERNELS["elementwise"], kernels_for("elementwise"), strict=True):
        assert callable(getattr(kernel, name, None)), path


def weights():
    codes = torch.randint(0, 256, (48, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = randn(48, 1).abs().cpu() + 0.1
    yield MadeFp8.from_float(randn(48, 256).cpu(), block=(1, 0), activations="token")
    yield MadeFp8.from_float(randn(48, 256).cpu(), block=(16, 128), activations="group")
    yield IntWeight(codes, scales, None, 8, 256, activations="token")


@pytest.mark.parametrize("weight", list(weights()), ids=lambda weight: str(weight.type))
def test_products_of_codes_are_those_of_the_floats_that_they_were_made_of(weight):
    problem = problem_for(weight, torch.bfloat16)
    kernel = select("linear", problem).kernel
    packed, bias = moved(kernel.pack(weight, problem)), randn(48, seed=3, dtype=torch.bfloat16)
    codes = kernel.input_codes(problem)
    x = randn(2, 3, 256, seed=1, dtype=torch.bfloat16)
    floats = OURS.rms_norm(x, None, 1e-6)
    expected = kernel.run(packed, problem, floats, bias)
    found = kernel.run(packed, problem, OURS.rms_norm(x, None, 1e-6, None, codes), bias)
    assert found.dtype is torch.bfloat16 and found.shape == (2, 3, 48)
    exact = 0.0 if HERE.type == "cpu" else 2e-2
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) <= exact


def test_a_kernel_whose_scale_is_known_before_asks_for_floats():
    for activations, scales in (("static", torch.ones(1)), ("tensor", None)):
        weight = Fp8Weight(
            torch.empty(32, 64).to(torch.float8_e4m3fn), torch.ones(1, 1), (0, 0), activations, scales
        )
        problem = problem_for(weight, torch.bfloat16)
        assert select("linear", problem).kernel.input_codes(problem) is None


class Attention(nn.Module):
    """Stands for attention: a projection that a decoder layer's norm feeds."""

    def __init__(self):
        super().__init__()
        self.qkv_proj = QKVParallelLinear(256, 64, 4, bias=False)

    @property
    def input_codes(self):
        return self.qkv_proj.input_codes

    def forward(self, positions, hidden):
        return self.qkv_proj(hidden)[:, :256].contiguous()


def decoder_layer():
    """A layer whose three fed products are fp8 with a scale a token."""
    config = SimpleNamespace(size=lambda name: 256, rms_norm_eps=1e-6)
    with Execution(dtype=torch.bfloat16, device=DEVICE.spec, compute="checkpoint"):
        layer = DecoderLayer(config, Attention(), GatedMLP(256, 96, "silu"))
        assert isinstance(layer.input_layernorm.kernel, TritonElementwise)
        for seed, linear in enumerate(
            (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
        ):
            weight = randn(*linear.weight.shape, seed=seed).cpu() / 16
            linear.quant_method = Fp8LinearMethod()
            made = MadeFp8.from_float(weight, block=(1, 0), activations="token")
            bind_layer(linear, made)
            linear.bound = type(linear.bound)(
                linear.bound.selection, linear.bound.problem, moved(linear.bound.packed)
            )
    return layer.to(HERE)


def launches(layer, tokens=2):
    x = torch.empty(tokens, 256, dtype=torch.bfloat16, device=HERE)
    with recording() as found:
        layer(None, x, x)
    return [launch.kernel.name for launch in found]


def test_a_decoder_layer_hands_codes_on_and_answers_as_it_does_with_floats():
    layer = decoder_layer()
    hidden, residual = (randn(5, 256, seed=seed, dtype=torch.bfloat16) for seed in (7, 8))
    for first in (None, residual):
        found = layer(None, hidden, first)
        handles = [m.register_forward_hook(lambda *_: None) for m in (layer.self_attn.qkv_proj, layer.mlp)]
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda *_: None))
        expected = layer(None, hidden, first)
        for handle in handles:
            handle.remove()
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other.double()).norm() / other.double().norm()
            assert float(error) <= (0.0 if HERE.type == "cpu" else 2e-2)


def test_only_who_alone_reads_a_result_gets_codes():
    layer = decoder_layer()
    assert launches(layer).count("norm_rows_to_codes") == 2 and "quantise_rows" not in launches(layer)
    for module in (layer.mlp, layer.mlp.gate_up_proj, layer.post_attention_layernorm):
        handle = module.register_forward_hook(lambda *_: None)
        assert launches(layer).count("norm_rows_to_codes") == 1 and "quantise_rows" in launches(layer)
        handle.remove()
    layer.mlp.down_proj.adapters["one"] = object()
    assert layer.mlp.down_proj.input_codes is None
    layer.mlp.down_proj.adapters.clear()
    assert "gate_rows_to_codes" in launches(layer)
    norm = RMSNorm(256)
    assert isinstance(norm(torch.randn(2, 256), taker=layer.mlp), torch.Tensor), "torch's kernels give floats"


def test_torch_compile_keeps_norm_gate_and_product_as_operators_that_hand_codes_on():
    weight = next(weights())
    problem = problem_for(weight, torch.bfloat16)
    kernel = select("linear", problem).kernel
    packed, codes = moved(kernel.pack(weight, problem)), kernel.input_codes(problem)

    def run(x, residual):
        rows, total = OURS.rms_norm(x, None, 1e-6, residual, codes)
        return kernel.run(packed, problem, rows, None), OURS.gelu_and_mul(total, codes).codes.float()

    x, residual = (randn(3, 256, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(x, residual), run(x, residual), strict=True):
        assert torch.equal(found, expected)
