"""compressed-tensors: config errors, targets, act order, fused parts, activations as the checkpoint asks."""

# O out_features, I in_features, G group_size

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.kernels.activations import quantise_activations
from pymllm.kernels.canonical import CodebookType, Fp8Type, IntType
from pymllm.layers.linear import Linear, MergedColumnParallelLinear, RowParallelLinear
from pymllm.parallel import Parallel, simulate
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.storage.packing import pack_words
from pymllm.weights.spec import LinearShape, Span

from ..checkpoints import CompressedFP8, relative_error, write_checkpoint
from ..conformance.vectors import fill_layer
from ..forward import logits_of

LINEAR = SimpleNamespace(kind="linear")
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


def settings(weights=W4, fmt="pack-quantized", activations=None, targets=("Linear",), **more):
    group = {"targets": list(targets), "weights": dict(weights), "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": group}}
    return {**config, **more}


def read(config):
    return get_quantization_config("compressed-tensors").from_config(config)


def method_of(config, stored=None, prefix="x"):
    found = read(config)
    if stored is not None:
        found.see_checkpoint(stored)
    return found.get_quant_method(LINEAR, prefix)


def changed(change, base=None):
    """The settings with a dotted field replaced."""
    config = copy.deepcopy(base or settings())
    *path, last = change[0].split(".")
    place = config
    for key in path:
        place = place[key]
    place[last] = change[1]
    return config


GROUP = "config_groups.group_0"


@pytest.mark.parametrize(
    ("config", "field", "value", "supported"),
    [
        (changed(("format", "marlin-24")), f"{GROUP}.format", "'marlin-24'", "pack-quantized"),
        (changed(("config_groups", {})), "config_groups", "{}", "an object of groups"),
        (
            changed(("sparsity_config", {"format": "sparse-24-bitmask"})),
            "sparsity_config",
            "sparse-24",
            "dense",
        ),
        (changed(("transform_config", {"config_groups": {"u": {}}})), "transform_config", "{}", "apply"),
        (changed((f"{GROUP}.weights.num_bits", 9)), f"{GROUP}.weights.num_bits", "9", "2 to 8"),
        (changed((f"{GROUP}.weights.type", "float")), f"{GROUP}.weights.type", "'float'", "'int'"),
        (
            changed((f"{GROUP}.weights.strategy", "block")),
            f"{GROUP}.weights.strategy",
            "'block'",
            "channel or group",
        ),
        (
            changed((f"{GROUP}.weights.group_size", None)),
            f"{GROUP}.weights.group_size",
            "None",
            "positive integer",
        ),
        (changed((f"{GROUP}.weights.symmetric", 1)), f"{GROUP}.weights.symmetric", "1", "true or false"),
        (
            changed((f"{GROUP}.weights.actorder", "random")),
            f"{GROUP}.weights.actorder",
            "'random'",
            "group, weight",
        ),
        (changed((f"{GROUP}.weights", None)), f"{GROUP}.weights", "None", "an object"),
        (changed((f"{GROUP}.output_activations", TOKEN8)), f"{GROUP}.output_activations", "token", "null"),
        (settings(NVFP4, "mxfp4-pack-quantized"), f"{GROUP}.weights.group_size", "16", "32"),
        (
            settings({**MXFP4, "symmetric": False}, "mxfp4-pack-quantized"),
            f"{GROUP}.weights.symmetric",
            "False",
            "True",
        ),
        (
            settings({**FP8, "strategy": "group"}, "float-quantized"),
            f"{GROUP}.weights.group_size",
            "None",
            "positive integer",
        ),
        (
            settings({**FP8, "strategy": "attn_head"}, "float-quantized"),
            f"{GROUP}.weights.strategy",
            "'attn_head'",
            "block",
        ),
        (
            settings(FP8, "float-quantized", {**TOKEN8, "type": "float", "symmetric": False}),
            f"{GROUP}.input_activations.symmetric",
            "False",
            "True",
        ),
        (
            settings(W8, "int-quantized", {**TOKEN8, "symmetric": False, "strategy": "group"}),
            f"{GROUP}.input_activations.strategy",
            "'group'",
            "token or tensor",
        ),
        (
            settings(W4, "pack-quantized", {**TOKEN8, "type": "float", "strategy": "tensor"}),
            f"{GROUP}.input_activations.strategy",
            "'tensor'",
            "'token'",
        ),
        (
            settings({**FP8, "strategy": "group", "group_size": 64}, "mxfp8-quantized"),
            f"{GROUP}.weights.group_size",
            "64",
            "32",
        ),
        (
            settings(W8, "int-quantized", {**TOKEN8, "num_bits": 4}),
            f"{GROUP}.input_activations.num_bits",
            "4",
            "8",
        ),
        (
            settings(W8, "int-quantized", {**TOKEN8, "dynamic": False}),
            f"{GROUP}.input_activations.strategy",
            "'token'",
            "tensor",
        ),
        (
            settings(NVFP4, "nvfp4-pack-quantized", TOKEN8),
            f"{GROUP}.input_activations.type",
            "'int'",
            "'float'",
        ),
    ],
)
def test_an_unreadable_config_names_field_value_and_what_is_supported(config, field, value, supported):
    with pytest.raises(ConfigError) as caught:
        read(config)
    message = str(caught.value)
    assert f"quantization_config.{field}" in message and value in message and supported in message


def test_a_group_that_names_a_layer_comes_before_patterns_and_those_before_the_class():
    config = settings()
    groups = config["config_groups"]
    groups["group_1"] = {"targets": ["re:.*down_proj$"], "weights": W8, "format": "int-quantized"}
    groups["group_2"] = {"targets": ["m.1.down_proj"], "weights": FP8, "format": "float-quantized"}
    config["format"], groups["group_0"]["format"] = "mixed-precision", "pack-quantized"
    config["ignore"] = ["lm_head", "re:.*gate$"]
    made = read(config)
    up, down, named = (
        made.get_quant_method(LINEAR, f"m.{n}") for n in ("0.up_proj", "0.down_proj", "1.down_proj")
    )
    assert (up.bits, up.packed) == (4, True)
    assert (down.bits, down.packed) == (8, False)
    assert "fp8" in named.describe()
    assert made.get_quant_method(LINEAR, "m.0.gate") is None
    assert made.get_quant_method(SimpleNamespace(kind="lm_head"), "lm_head") is None


def test_groups_that_claim_the_same_target_are_an_error_that_names_both():
    config = settings()
    config["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": W8, "format": "int-quantized"}
    with pytest.raises(ConfigError, match=r"group_1\.targets.*group_0 has it too.*found 'Linear'"):
        read(config)


@pytest.mark.parametrize("target", ("Linera", "model.layers.0.mlp.up_prj"))
def test_a_misspelt_target_is_an_error_with_the_nearest_name(target):
    config = read(settings(targets=[target]))
    with pytest.raises(ConfigError, match=r"Nearest: (Linear|model\.layers\.0\.mlp\.up_proj)") as caught:
        config.see_checkpoint(
            {"model.layers.0.mlp.up_proj.weight_packed": SimpleNamespace(dtype=torch.int32)}
        )
    assert f"{GROUP}.targets" in str(caught.value) and repr(target) in str(caught.value)


def packed_layer(out_features, in_features, *, seed=0, bits=4, act_order=False):
    """An asymmetric layer: (tensors, the float64 weight that they mean)."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // 32
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 2**bits, (out_features, groups), generator=generator)
    scales = torch.rand(out_features, groups, generator=generator) * 0.01 + 0.001
    index = torch.arange(in_features) // 32
    if act_order:
        index = index[torch.randperm(in_features, generator=generator)]
    tensors = {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out_features, in_features]),
        "weight_zero_point": pack_words(zeros.t(), bits).t().contiguous(),
    }
    if act_order:
        tensors["weight_g_idx"] = index.to(torch.int32)
    return tensors, (codes - zeros[:, index]) * scales.double()[:, index]


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_parts_whose_zero_points_do_not_fill_their_last_word_fuse(bits):
    """60 and 36 outputs: the words of a part end with fields that mean nothing."""
    config = read(settings({**W4, "num_bits": bits, "symmetric": False}))
    parts = [packed_layer(out, 96, seed=out, bits=bits) for out in (60, 36)]
    layer = fill_layer(
        lambda: MergedColumnParallelLinear(
            96, [60, 36], False, part_names=["a", "b"], quant_config=config, prefix="x"
        ),
        [tensors for tensors, _ in parts],
    )
    weight = bound_weight(layer).canonical().dequantize(torch.float64)
    assert torch.equal(weight, torch.cat([meant for _, meant in parts]))


@pytest.mark.parametrize("size", (1, 2, 4))
def test_act_order_by_group_is_honoured_whole_and_sharded(size):
    config = read(settings({**W4, "symmetric": False, "actorder": "group"}))
    tensors, meant = packed_layer(64, 128, act_order=True)
    for rank in range(size):
        layer = fill_layer(
            lambda: RowParallelLinear(128, 64, False, False, quant_config=config, prefix="x"),
            [tensors],
            Parallel(rank, size),
        )
        weight = bound_weight(layer).canonical()
        assert weight.type.indexed is (size > 1)
        inputs = slice(layer.input_start_index, layer.input_end_index)
        assert torch.equal(weight.dequantize(torch.float64), meant[:, inputs])


def test_act_order_by_weight_stores_nothing_and_an_unset_index_is_in_order():
    weight_order = settings({**W4, "actorder": "weight"})
    assert method_of(weight_order).index == "absent"
    stored = {f"x.{n}": SimpleNamespace(dtype=torch.int32) for n in ("weight_packed", "weight_g_idx")}
    method = method_of(weight_order, stored)
    assert method.index == "in order"
    shape = LinearShape(Span.full(64), (Span.full(8),), ("x",), torch.float32)
    (spec,) = (spec for spec in method.weight_specs(shape) if spec.name == "weight_g_idx")
    assert spec.refuse(torch.full((64,), -1, dtype=torch.int32), shape) is None
    assert "do not lie in order" in spec.refuse(torch.zeros(64, dtype=torch.int32), shape)


def test_a_stored_shape_must_be_the_layers():
    shape = LinearShape(Span.full(64), (Span.full(8),), ("x",), torch.float32)
    (spec,) = (s for s in method_of(settings()).weight_specs(shape) if s.name == "weight_shape")
    assert spec.refuse(torch.tensor([[8, 64]]), shape) is None
    assert "[64, 8], where the layer has [8, 64]" in spec.refuse(torch.tensor([[64, 8]]), shape)


@pytest.mark.parametrize("per_tensor", (False, True))
@pytest.mark.parametrize("symmetric", (True, False))
def test_int8_parts_with_scales_of_their_own_fuse(per_tensor, symmetric):
    config = read(
        settings(
            {**W8, "strategy": "tensor" if per_tensor else "channel", "symmetric": symmetric}, "int-quantized"
        )
    )
    generator = torch.Generator().manual_seed(0)
    parts, meant = [], []
    for out in (24, 40):
        shape = (1,) if per_tensor else (out, 1)
        codes = torch.randint(-128, 128, (out, 56), generator=generator).to(torch.int8)
        scale = torch.rand(shape, generator=generator) + 0.1
        zero = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        tensors = {"weight": codes, "weight_scale": scale}
        parts.append(tensors if symmetric else {**tensors, "weight_zero_point": zero})
        meant.append((codes.double() - (0 if symmetric else zero.double())) * scale.double())
    layer = fill_layer(
        lambda: MergedColumnParallelLinear(
            56, [24, 40], False, part_names=["a", "b"], quant_config=config, prefix="x"
        ),
        parts,
    )
    assert torch.equal(bound_weight(layer).canonical().dequantize(torch.float64), torch.cat(meant))


def test_parts_of_nvfp4_keep_their_global_scales():
    config = read(settings(NVFP4, "nvfp4-pack-quantized"))
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    parts, meant = [], []
    for out, overall in ((32, 8.0), (16, 0.25)):
        codes = torch.randint(0, 16, (out, 64), generator=generator).to(torch.uint8)
        scale = (torch.rand(out, 4, generator=generator) * 100 + 1).to(torch.float8_e4m3fn)
        value = values[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
        meant.append(value * scale.double().repeat_interleave(16, 1) / overall)
        parts.append(
            {
                "weight_packed": codes[:, 0::2] | (codes[:, 1::2] << 4),
                "weight_scale": scale,
                "weight_global_scale": torch.tensor([overall]),
            }
        )
    layer = fill_layer(
        lambda: MergedColumnParallelLinear(
            64, [32, 16], False, part_names=["a", "b"], quant_config=config, prefix="x"
        ),
        parts,
    )
    assert torch.equal(bound_weight(layer).canonical().dequantize(torch.float64), torch.cat(meant))


def test_zero_points_are_skipped_of_symmetric_layers_alone():
    config = read(settings())
    config.see_checkpoint(dict.fromkeys(("x.weight_scale", "x.weight_zero_point")))
    assert "symmetric" in config.skip_reason("x.weight_zero_point").reason
    assert config.skip_reason("y.weight_zero_point") is None
    assert config.skip_reason("x.weight_packed") is None


# Activations, by quantization/compressed_tensors/README.md, "Activations"

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


@pytest.mark.parametrize(
    "pattern",
    (
        "(a+)+b",
        "(a|aa)*b",
        "(?:.*x){3}",
        ".*.*.*.*.*.*x",
        "x" * 1001,
        "(" * 500 + ")" * 500 + "*" * 2,
        "a(",
        "(a{1,30}){1,30}b",
    ),
)
@pytest.mark.parametrize("field", ("ignore", "targets"))
def test_a_pattern_that_could_take_forever_is_refused(pattern, field):
    change = ("ignore", [f"re:{pattern}"]) if field == "ignore" else (f"{GROUP}.targets", [f"re:{pattern}"])
    with pytest.raises(ConfigError) as caught:
        read(changed(change, settings(ignore=[])))
    assert caught.value.code == "quantization-config" and field in str(caught.value)


@pytest.mark.parametrize(
    "pattern", (r".*mlp\.(gate|up)_proj$", r"model\.layers\.(?:1[0-9]|2\d)\..*", ".*layers.*self_attn.*")
)
def test_ordinary_patterns_are_taken(pattern):
    assert read(settings(ignore=[f"re:{pattern}"])).ignore == (f"re:{pattern}",)


def test_float8_with_a_scale_for_every_group_of_inputs(tmp_path):
    def by_group(raw):
        weights = raw["quantization_config"]["config_groups"]["group_0"]["weights"]
        weights |= {"strategy": "group", "group_size": 32}
        del weights["block_structure"]

    writer = CompressedFP8("block", block=(1, 32))
    checkpoint = write_checkpoint(tmp_path / "m", "llama", writer, edit_config=by_group)
    model = pymllm.load_model(checkpoint.folder, dtype="float32", device="cpu")
    assert relative_error(logits_of(model, checkpoint.ids), checkpoint.logits()) <= 1e-5
