"""Rules that turn one format into another: int4, int8, fp8, awq, mxfp4, nvfp4, none, from AWQ and from bf16."""

# O out_features, I in_features

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError, ShardingError
from pymllm.layers.linear import Linear, RowParallelLinear
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.rules import Rule
from pymllm.weights.spec import LinearShape, Span

from ..checkpoints import write_checkpoint
from ..forward import logits_of

TARGETS = (
    "int4:group_size=64",
    "int4:group_size=32,scale=mse",
    "int4:group_size=64,scale=hqq",
    "int4:group_size=-1,symmetric=true,scale=mse",
    "int8",
    "int8:group_size=64,symmetric=false",
    "fp8",
    "fp8:granularity=block",
    "awq:group_size=64",
    "mxfp4",
    "nvfp4",
    "none",
)
SOURCES = ("awq-g64", "none-bf16")


def method_of(text):
    return Rule.parse(f"x={text}").build()


def shape_of(out_features, in_features):
    return LinearShape(Span.full(in_features), (Span.full(out_features),), ("x",), torch.float32)


def error_of(text, weight):
    coded = method_of(text).quantize(weight, shape_of(*weight.shape))
    return float((coded.dequantize(torch.float32) - weight).square().sum().sqrt() / weight.norm())


def normal(out_features=48, in_features=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out_features, in_features, generator=generator)


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source"), "llama", request.param)


@pytest.mark.parametrize("target", TARGETS)
def test_any_target_from_any_source_loads_verifies_and_costs_only_its_own_error(source, target):
    model = pymllm.load_model(source.folder, quant=[f"**.layers.**={target}"], device="cpu", dtype="float32")
    assert pymllm.verify(model).ok
    meant = dict(source.model.named_parameters())
    for layer in model.modules():
        bound = bound_weight(layer)
        parts = getattr(getattr(layer, "shape", None), "parts", ())
        if bound is None or not all(".layers." in part for part in parts):
            continue
        weights = [meant[f"{part}.weight"].detach() for part in parts]
        found = bound.canonical().dequantize(torch.float32).split([len(weight) for weight in weights])
        for weight, again in zip(weights, found, strict=True):
            # The target's own error: what the method makes of the weight that the source means. Blocks of 128
            # outputs run across the parts of a fused layer that are smaller than that (k and v have 64).
            slack = 1.05 if "block" in target else 1.001
            assert (again - weight).norm() / weight.norm() <= error_of(target, weight) * slack + 1e-7


@pytest.mark.parametrize("target", ("int4:group_size=32", "int8", "mxfp4", "nvfp4"))
def test_two_ranks_answer_as_one(source, target):
    def run(parallel=None):
        rules = [f"**.layers.**={target}"]
        return logits_of(
            pymllm.load_model(source.folder, quant=rules, device="cpu", dtype="float32"), source.ids
        )

    alone = run()
    for logits in simulate(2, run):
        # nvfp4 and int8 per row scale each rank's share by itself, which is a rounding of its own.
        bound = 1e-4 if target in ("int4:group_size=32", "mxfp4") else 0.3
        assert (logits - alone).norm() / alone.norm() < bound


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("symmetric", ("true", "false"))
def test_searched_scales_are_never_worse_than_the_whole_range(bits, symmetric):
    weight = normal()
    weight[:, ::37] *= 6  # outliers, which a range should not follow
    plain, searched = (
        method_of(f"int{bits}:group_size=64,symmetric={symmetric},scale={scale}").quantize(
            weight, shape_of(48, 256)
        )
        for scale in ("minmax", "mse")
    )
    errors = [
        (coded.dequantize(torch.float64) - weight).square().unflatten(1, (-1, 64)).sum(-1)
        for coded in (plain, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert bits == 8 or errors[1].sum() < 0.97 * errors[0].sum()


def test_refined_zero_points_lower_the_error_of_most_weights():
    weight = normal()
    assert error_of("int4:group_size=64,scale=hqq", weight) < error_of("int4:group_size=64", weight)


@pytest.mark.parametrize("target", TARGETS)
def test_zeros_and_single_values_survive(target):
    weight = torch.zeros(8, 128)
    weight[1] = 0.25
    weight[2, 5] = -3.0
    coded = method_of(target).quantize(weight, shape_of(8, 128)).dequantize(torch.float32)
    assert torch.isfinite(coded).all() and (coded[0] == 0).all()
    assert (coded - weight).abs().max() <= 0.3


@pytest.mark.parametrize(
    ("text", "said"),
    (
        ("int4:group=64", "group_size"),
        ("int4:group_size=0", "group_size"),
        ("int4:group_size=many", "group_size"),
        ("int8:symmetric=maybe", "true, false"),
        ("int4:scale=best", "minmax, mse, hqq"),
        ("int4:scale=hqq,symmetric=true", "symmetric"),
        ("mxfp4:group_size=16", "group_size"),
        ("nvfp4:scale=mse", "scale"),
    ),
)
def test_an_option_that_is_not_supported_is_named_with_what_is(text, said):
    with pytest.raises(ConfigError, match=said):
        method_of(text)


@pytest.mark.parametrize("name", ("int4", "int8", "nvfp4"))
def test_a_target_is_not_the_format_of_a_checkpoint(name):
    with pytest.raises(ConfigError, match=name):
        get_quantization_config(name).from_config({"quant_method": name})


@pytest.mark.parametrize(("text", "width"), (("int4:group_size=48", 128), ("mxfp4", 72), ("nvfp4", 72)))
def test_groups_that_do_not_divide_the_inputs_are_refused_with_the_layers_name(text, width):
    with pytest.raises(ConfigError, match="x"):
        method_of(text).check(shape_of(16, width))


def test_groups_that_a_rank_would_cut_are_a_sharding_error():
    method = ConvertedLinearMethod(UnquantizedLinearMethod(), method_of("int4:group_size=64"))
    assert Linear(192, 16, False, quant_method=method) is not None
    with Parallel(0, 2), pytest.raises(ShardingError, match="96"):
        RowParallelLinear(192, 16, False, quant_method=method)
