"""compressed-tensors: config errors, targets, act order, fused parts, patterns."""

# O out_features, I in_features, G group_size

import copy
from types import SimpleNamespace

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from pymllm.parallel import Parallel
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


@pytest.mark.parametrize(
    "pattern", ("x" * 1001, "(" * 500 + ")" * 500 + "*" * 2, "a(", "(?<=a*)b", "(a*)(b*)\\1")
)
@pytest.mark.parametrize("field", ("ignore", "targets"))
def test_a_pattern_that_cannot_be_matched_is_refused(pattern, field):
    change = ("ignore", [f"re:{pattern}"]) if field == "ignore" else (f"{GROUP}.targets", [f"re:{pattern}"])
    with pytest.raises(ConfigError) as caught:
        read(changed(change, settings(ignore=[])))
    assert caught.value.code == "quantization-config" and field in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    (
        r".*mlp\.(gate|up)_proj$",
        r"model\.layers\.(?:1[0-9]|2\d)\..*",
        ".*layers.*self_attn.*",
        r"^(?!.*patch_embed).*(?:\w+\.)*q_proj",
        "(a+)+b",
        ".?" * 60 + "Z",
    ),
)
def test_ordinary_patterns_are_taken_and_so_are_others_that_can_be_matched(pattern):
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
