"""compressed-tensors: activations that are rounded as the checkpoint asks, in every number format."""

# O out_features, I in_features, G group_size

from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.canonical import CodebookType, Fp8Type, IntType
from pymllm.layers.linear import Linear
from pymllm.parallel import simulate
from pymllm.weights.spec import LinearShape, Span

from ..checkpoints import write_checkpoint
from ..conformance.vectors import fill_layer
from ..forward import logits_of
from .test_compressed_tensors import FP8, MXFP4, NVFP4, TOKEN8, W4, W8, method_of, read, settings

# The formulas are those of quantization/compressed_tensors/README.md, "Activations".

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def to_e2m1(values):
    """The nearest e2m1 value in float64; ties go to the even code."""
    distance = (values.abs().unsqueeze(-1) - E2M1).abs()
    best = distance.amin(-1, keepdim=True)
    even_first = torch.where(distance == best, torch.arange(8) % 2, 9)
    return torch.copysign(E2M1[even_first.argmin(-1)], values)


def activations():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(7)) * torch.logspace(-3, 2, 6)[:, None]
    x[0, :16] = 0.0
    return x


@pytest.mark.parametrize("kind", ("token", "tensor", "static"))
def test_int8_activations_span_minus_128_to_127(kind):
    x = activations()
    static = torch.tensor([0.02, 0.05])
    peak = {"token": x.abs().amax(-1, keepdim=True), "tensor": x.abs().max()}.get(kind)
    scale = static.max() if kind == "static" else peak / 127.5
    expected = (x / scale).round().clamp(-128, 127) * scale
    got = quantise_activations(x, IntType(8, 64, True, activations=kind), static)
    assert torch.equal(got, expected)


def test_nvfp4_activations_have_e4m3_scales_over_the_global_one():
    x = activations()
    overall = torch.tensor([448 * 6 / x.abs().max(), 448 * 6 / x.abs().max() * 3])
    got = quantise_activations(x, CodebookType("e2m1", 16, "group"), overall)
    groups = x.unflatten(-1, (-1, 16))
    stored = (
        (groups.abs().amax(-1, keepdim=True) / 6 * overall.min())
        .clamp(max=448)
        .to(torch.float8_e4m3fn)
        .float()
    )
    scale = torch.where(stored == 0, 0.125, stored) / overall.min()
    expected = to_e2m1((groups / scale).double()).float() * scale
    assert torch.equal(got, expected.flatten(-2))


def test_mxfp4_activations_have_scales_that_are_powers_of_two():
    x = activations()
    x[1, 0], x[2, 0] = 1.75 * 2.0**6, 1.74 * 2.0**8  # a group whose scale doubles, and one whose does not
    got = quantise_activations(x, CodebookType("e2m1", 32, "group"), None)
    groups = x.double().unflatten(-1, (-1, 32))
    peak = groups.abs().amax(-1, keepdim=True)
    floor = torch.floor(torch.log2(peak))
    floor = floor + (peak / 2**floor >= 1.75)
    scale = 2.0 ** (floor - 2)
    assert torch.equal(got.double(), (to_e2m1(groups / scale) * scale).flatten(-2))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "kind",
    (IntType(8, 64, True, activations="token"), Fp8Type((1, 0), "token"), CodebookType("e2m1", 32, "group")),
)
def test_no_activations_and_zeros_stay_what_they_are(dtype, kind):
    for x in (torch.zeros(2, 64, dtype=dtype), torch.zeros(0, 64, dtype=dtype)):
        assert torch.equal(quantise_activations(x, kind, None), x)


MXFP8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("weights", "fmt", "quantised", "expected"),
    [
        (W8, "int-quantized", TOKEN8, "token"),
        (W8, "int-quantized", {**TOKEN8, "symmetric": False}, "token asym"),
        (W8, "int-quantized", {**TOKEN8, "symmetric": False, "strategy": "tensor"}, "tensor asym"),
        (
            W8,
            "int-quantized",
            {**TOKEN8, "symmetric": False, "dynamic": False, "strategy": "tensor"},
            "static asym",
        ),
        (W4, "pack-quantized", {**TOKEN8, "type": "float"}, "token fp8"),
        (MXFP8, "mxfp8-quantized", None, "float"),
        (MXFP8, "mxfp8-quantized", {**MXFP8, "dynamic": True}, "group mx"),
        (W8, "int-quantized", {**TOKEN8, "dynamic": False, "strategy": "tensor"}, "static"),
        (W4, "pack-quantized", TOKEN8, "token"),
        (
            NVFP4,
            "nvfp4-pack-quantized",
            {**NVFP4, "dynamic": "local"},
            "group",
        ),
        (MXFP4, "mxfp4-pack-quantized", {**MXFP4, "dynamic": True}, "group"),
        (FP8, "float-quantized", {**TOKEN8, "type": "float"}, "token"),
    ],
)
def test_activations_are_read_from_the_config(weights, fmt, quantised, expected):
    method = method_of(settings(weights, fmt, quantised))
    assert method.activations == expected and f"activations {expected}" in method.describe()
    shape = LinearShape(Span.full(64), (Span.full(8),), ("x",), torch.float32)
    names = {spec.name for spec in method.weight_specs(shape)}
    assert ("input_scale" in names) is expected.startswith("static")
    assert ("input_global_scale" in names) is (fmt == "nvfp4-pack-quantized")
    assert method.planned(shape).type.activations == expected


def test_a_layer_runs_its_activations_through_the_reference_when_asked():
    from pymllm.config import Execution

    config = read(settings(W8, "int-quantized", TOKEN8))
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (16, 64), generator=generator).to(torch.int8)
    scale = torch.rand(16, 1, generator=generator) + 0.1
    with Execution(dtype=torch.float32, compute="checkpoint"):
        layer = fill_layer(
            lambda: Linear(64, 16, False, quant_config=config, prefix="x"),
            [{"weight": codes, "weight_scale": scale}],
        )
    x = activations()
    step = x.abs().amax(-1, keepdim=True) / 127.5
    quantised = (x / step).round().clamp(-128, 127).double() * step.double()
    expected = quantised @ (codes.double() * scale.double()).t()
    assert (layer(x).double() - expected).norm() / expected.norm() < 1e-6


def test_static_asymmetric_activations_keep_parts_apart_as_each_has_a_zero_point_of_its_own():
    static = {**TOKEN8, "symmetric": False, "dynamic": False, "strategy": "tensor"}
    method = method_of(settings(W8, "int-quantized", static))
    assert not method.fuses
    names = [
        spec.name
        for spec in method.weight_specs(LinearShape(Span.full(64), (Span.full(8),), ("x",), torch.float32))
    ]
    assert "input_scale" in names and "input_zero_point" in names


@dataclass(frozen=True)
class IntWeights:
    """int8 a row, and static activations with a zero point."""

    def config(self, ignored):
        static = {**TOKEN8, "symmetric": False, "dynamic": False, "strategy": "tensor"}
        return settings(W8, "int-quantized", static, ignore=["lm_head", *ignored])

    def encode(self, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        codes = (weight / scale).round().clamp(-128, 127)
        stored = {"weight": codes.to(torch.int8), "weight_scale": scale}
        stored |= {
            "input_scale": torch.tensor([0.04]),
            "input_zero_point": torch.tensor([17], dtype=torch.int8),
        }
        return stored, codes * scale


@dataclass(frozen=True)
class MXFP8Weights:
    """e4m3 with powers of two for 32 inputs."""

    def config(self, ignored):
        return settings(MXFP8, "mxfp8-quantized", {**MXFP8, "dynamic": True}, ignore=["lm_head", *ignored])

    def encode(self, weight):
        groups = weight.unflatten(1, (-1, 32))
        exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 8
        codes = (groups / 2.0 ** exponent[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {"weight": codes.flatten(1), "weight_scale": (exponent + 127).to(torch.uint8)}
        return stored, (codes.float() * 2.0 ** exponent[..., None]).flatten(1)


@pytest.mark.parametrize("writer", (IntWeights(), MXFP8Weights()), ids=repr)
def test_weights_are_exact_and_activations_rounded_only_where_the_checkpoint_is_to_decide(writer, tmp_path):
    written = write_checkpoint(tmp_path, "llama", writer)
    expected = written.logits()
    assert pymllm.verify(tmp_path, device="cpu").ok

    def run(parallel=None, **options):
        return logits_of(pymllm.load_model(tmp_path, device="cpu", **options), written.ids)

    for logits in (run(dtype="float32"), *simulate(2, lambda parallel: run(dtype="float32"))):
        assert (logits - expected).norm() / expected.norm() < 1e-5
    rounded = run(dtype="float32", compute="checkpoint")
    assert 1e-3 < (rounded - expected).norm() / expected.norm() < 0.3
    if isinstance(writer, MXFP8Weights):  # a static scale clips what `verify` makes large
        assert pymllm.verify(tmp_path, device="cpu", compute="checkpoint").ok


def test_compute_checkpoint_runs_in_the_checkpoints_dtype(tmp_path):
    write_checkpoint(tmp_path, "llama", MXFP8Weights(), edit_config=lambda raw: raw.update(dtype="bfloat16"))
    assert pymllm.load_model(tmp_path, device="cpu").prepared.execution.dtype is torch.float32
    prepared = pymllm.load_model(tmp_path, device="cpu", compute="checkpoint").prepared
    assert prepared.execution.dtype is torch.bfloat16
