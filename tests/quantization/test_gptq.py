"""GPTQ and AutoRound: config errors, rules by module, act order whole, sharded and in fused layers."""

# O out_features, I in_features, G group_size

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from pymllm.config import Execution
from pymllm.errors import CheckpointError, ConfigError
from pymllm.layers.linear import (
    ColumnParallelLinear,
    Linear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from pymllm.layers.split import SplitLinearMethod
from pymllm.parallel import Parallel
from pymllm.quantization.base import QuantizationConfig, get_quantization_config
from pymllm.quantization.binding import bind, bound_weight
from pymllm.quantization.storage.packing import pack_words, unpack_words
from pymllm.weights.spec import LinearShape, Span

from ..conformance.vectors import fill_layer

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
LINEAR = SimpleNamespace(kind="linear")
ACT_ORDER = sorted((Path(__file__).parents[2] / "quantization/gptq/golden/act_order").glob("*.safetensors"))


def read(settings):
    return get_quantization_config(settings["quant_method"]).from_config(settings)


def make_tensors(in_features, out_features, *, group=32, bits=4, seed=0, minus_one=True):
    """A layer in act order, asymmetric: (tensors by suffix, the float64 weight [O, I] that they mean)."""
    generator = torch.Generator().manual_seed(seed)

    def random(top, *shape):
        return torch.randint(0, top, shape, generator=generator)

    groups = -(-in_features // group)
    codes = random(2**bits, out_features, in_features)
    zeros = random(2**bits - 1, groups, out_features) + 1
    scales = (torch.rand(groups, out_features, generator=generator) * 0.01 + 0.001).half()
    index = (torch.arange(in_features) // group)[torch.randperm(in_features, generator=generator)]
    meant = (codes - zeros[index].t()) * scales.double()[index].t()
    tensors = {
        "qweight": pack_words(codes, bits).t().contiguous(),
        "qzeros": pack_words(zeros - int(minus_one), bits),
        "scales": scales,
        "g_idx": index.to(torch.int32),
    }
    return tensors, meant


def act_order_config(stored=()):
    config = read({**GPTQ, "sym": False, "desc_act": True})
    config.see_checkpoint(dict.fromkeys(stored))
    return config


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", (32, 96, 40, 7))
def test_words_hold_fields_lowest_bits_first_without_gaps(bits, count):
    fields = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits))
    words = pack_words(fields, bits)
    assert words.shape == (3, -(-count * bits // 32)) and words.dtype is torch.int32
    for row in range(3):
        stream = sum(int(field) << (bits * k) for k, field in enumerate(fields[row]))
        stored = sum((int(word) & 0xFFFFFFFF) << (32 * k) for k, word in enumerate(words[row]))
        assert stored == stream
    assert torch.equal(unpack_words(words, bits)[:, :count].long(), fields)


@pytest.mark.parametrize(
    ("change", "field", "value", "supported"),
    [
        ({"bits": 5}, "bits", "5", "2, 3, 4 or 8"),
        ({"bits": None}, "bits", "None", "2, 3, 4 or 8"),
        ({"group_size": 0}, "group_size", "0", "-1 (whole rows) or a positive integer"),
        ({"group_size": "128"}, "group_size", "'128'", "positive integer"),
        ({"sym": "yes"}, "sym", "'yes'", "true or false"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format", "'marlin'", "gptq or gptq_v2"),
        ({"pack_dtype": "int16"}, "pack_dtype", "'int16'", "int32"),
        ({"is_marlin_format": True}, "is_marlin_format", "True", "false"),
        ({"dynamic": {"+:(": {}}}, "dynamic.+:(", "'+:('", "a regular expression"),
        ({"dynamic": {"x": {"bits": 7}}}, "dynamic.x.bits", "7", "2, 3, 4 or 8"),
        ({"dynamic": {"x": {"adapter": {"rank": 1}}}}, "dynamic.x.adapter", "rank", "null"),
        ({"modules_in_block_to_quantize": "mlp"}, "modules_in_block_to_quantize", "'mlp'", "a list"),
    ],
)
def test_an_unreadable_gptq_config_names_field_value_and_what_is_supported(change, field, value, supported):
    with pytest.raises(ConfigError) as caught:
        read({**GPTQ, **change})
    message = str(caught.value)
    assert f"quantization_config.{field}" in message and value in message and supported in message


def test_dynamic_rules_are_regular_expressions_of_which_the_first_match_wins():
    config = read(
        {
            **GPTQ,
            "dynamic": {
                r"-:.*\.layers\.0\.mlp\.up_proj": {},
                r"+:.*\.layers\.0\.mlp\..*": {"bits": 8, "group_size": 64, "sym": False},
                r".*\.layers\.0\..*": {"desc_act": True},
                r"mlp": {"bits": 2},  # matched from the start of a name, so never
            },
        }
    )
    left_out, eight, ordered, plain = (
        config.get_quant_method(LINEAR, f"model.layers.{name}")
        for name in ("0.mlp.up_proj", "0.mlp.down_proj", "0.self_attn.q_proj", "1.mlp.up_proj")
    )
    assert left_out is None
    assert (eight.bits, eight.group_size, eight.symmetric) == (8, 64, False)
    assert (ordered.bits, ordered.index) == (4, "act order")
    assert (plain.bits, plain.group_size, plain.symmetric, plain.index) == (4, 32, True, "absent")


def test_only_the_listed_modules_of_a_block_are_quantised():
    config = read({**GPTQ, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]})
    assert config.get_quant_method(LINEAR, "model.layers.3.mlp.down_proj") is not None
    assert config.get_quant_method(LINEAR, "model.layers.3.mlp.up_proj") is None


def test_a_head_is_quantised_where_the_file_holds_its_codes():
    head = SimpleNamespace(kind="lm_head")
    config = read({**GPTQ, "lm_head": True})
    assert config.get_quant_method(head, "lm_head") is None
    config.see_checkpoint({"lm_head.qweight": None})
    assert config.get_quant_method(head, "lm_head") is not None


@pytest.mark.parametrize("path", ACT_ORDER, ids=lambda path: path.stem)
def test_act_order_decodes_to_the_writers_dequantisation(path):
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    method = read(case["quantization_config"]).get_quant_method(LINEAR, "x")
    shape = LinearShape(
        Span.full(case["in_features"]), (Span.full(case["out_features"]),), ("x",), torch.float32
    )
    weight = method.to_canonical(tensors, shape)
    assert weight.input_order is not None and not weight.type.indexed
    assert torch.equal(weight.dequantize(torch.float32).half().float(), tensors["dequantized"])


@pytest.mark.parametrize("bits", (3, 4))
def test_act_order_runs_like_the_weight_it_means(bits):
    tensors, meant = make_tensors(128, 64, bits=bits)
    config = read({**GPTQ, "bits": bits, "sym": False, "desc_act": True})
    layer = fill_layer(lambda: Linear(128, 64, False, quant_config=config, prefix="x"), [tensors])
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ meant.t()
    assert (layer(x).double() - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("size", (2, 4))
def test_act_order_under_row_parallelism_equals_the_unsharded_layer(size):
    tensors, meant = make_tensors(256, 64)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(5, 64, dtype=torch.float64)
    for rank in range(size):
        layer = fill_layer(
            lambda: RowParallelLinear(256, 64, False, False, quant_config=act_order_config(), prefix="x"),
            [tensors],
            Parallel(rank, size),
        )
        inputs = slice(layer.input_start_index, layer.input_end_index)
        weight = bound_weight(layer).canonical()
        assert weight.type.indexed
        assert torch.equal(weight.dequantize(torch.float64), meant[:, inputs])
        total += layer(x[:, inputs]).double()
    expected = x.double() @ meant.t()
    assert (total - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize("size", (1, 2))
def test_parts_of_a_fused_layer_that_order_their_inputs_differently_stay_apart(size):
    parts = [make_tensors(128, out, seed=out) for out in (64, 32)]
    for rank in range(size):
        layer = fill_layer(
            lambda: MergedColumnParallelLinear(
                128,
                [64, 32],
                False,
                False,
                part_names=["a", "b"],
                quant_config=act_order_config(),
                prefix="x",
            ),
            [tensors for tensors, _ in parts],
            Parallel(rank, size),
        )
        assert isinstance(layer.quant_method, SplitLinearMethod)
        rows = [meant[rank * len(meant) // size :][: len(meant) // size] for _, meant in parts]
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
        expected = x.double() @ torch.cat(rows).t()
        assert (layer(x).double() - expected).norm() / expected.norm() < 1e-6


def test_parts_in_order_are_one_weight():
    layer_type = lambda: MergedColumnParallelLinear(  # noqa: E731
        128, [64, 32], False, part_names=["a", "b"], quant_config=read(GPTQ), prefix="x"
    )
    assert not isinstance(layer_type().quant_method, SplitLinearMethod)


def test_a_plan_knows_act_order_of_every_share_without_data():
    method = act_order_config().get_quant_method(LINEAR, "x")
    tensors, _ = make_tensors(256, 64)
    for inputs in (Span.full(256), Span(128, 256, 256)):
        shape = LinearShape(inputs, (Span.full(64),), ("x",), torch.float32)
        cut = slice(inputs.start, inputs.stop)
        local = {
            **tensors,
            "qweight": tensors["qweight"][inputs.start // 8 : inputs.stop // 8],
            "g_idx": tensors["g_idx"][cut].reshape(1, -1),
        }
        planned = bind(method.planned(shape), Execution(dtype=torch.float32), "linear")
        real = bind(method.to_canonical(local, shape), Execution(dtype=torch.float32), "linear")
        assert planned.problem == real.problem and planned.nbytes == real.nbytes
        assert planned.problem.weight.indexed is (inputs.size < 256)


def test_a_short_last_group_is_read_whole_and_by_column_share():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (32, 80), generator=generator)
    scales = torch.rand(3, 32, generator=generator).half() + 0.1
    tensors = {
        "qweight": pack_words(codes, 4).t().contiguous(),
        "qzeros": torch.full((3, 4), 0x77777777, dtype=torch.int32),
        "scales": scales,
    }
    meant = (codes - 8) * scales.double()[torch.arange(80) // 32].t()
    for rank in range(2):
        layer = fill_layer(
            lambda: ColumnParallelLinear(80, 32, False, quant_config=read(GPTQ), prefix="x"),
            [tensors],
            Parallel(rank, 2),
        )
        weight = bound_weight(layer).canonical().dequantize(torch.float64)
        assert torch.equal(weight, meant[rank * 16 : rank * 16 + 16])


@pytest.mark.parametrize("in_order", (True, False))
@pytest.mark.parametrize(("in_features", "size"), ((96, 32), (80, 16), (72, None)))
def test_a_short_last_group_keeps_inputs_in_order_where_smaller_groups_divide_all(
    in_features, size, in_order
):
    tensors, meant = make_tensors(in_features, 32, group=64)
    index = tensors.pop("g_idx")
    if in_order:
        meant = meant[:, torch.argsort(index, stable=True)]
        codes = unpack_words(tensors["qweight"].t(), 4)[:, :in_features]
        tensors["qweight"] = pack_words(codes[:, torch.argsort(index, stable=True)], 4).t().contiguous()
    else:
        tensors["g_idx"] = index.reshape(1, -1)
    config = read({**GPTQ, "group_size": 64, "sym": False, "desc_act": not in_order})
    method = config.get_quant_method(LINEAR, "x")
    shape = LinearShape(Span.full(in_features), (Span.full(32),), ("x",), torch.float32)
    real, planned = (
        bind(weight, Execution(dtype=torch.float32), "linear")
        for weight in (method.to_canonical(tensors, shape), method.planned(shape))
    )
    assert planned.problem == real.problem
    assert real.problem.weight.indexed is (size is None)
    assert size in (None, real.problem.weight.group_size)
    assert torch.equal(real.canonical().dequantize(torch.float64), meant)


def test_contradicting_tensors_are_refused_with_what_they_hold():
    shape = LinearShape(Span.full(64), (Span.full(32),), ("x",), torch.float32)
    config = read(GPTQ)
    config.see_checkpoint({"x.g_idx": None})
    specs = {spec.name: spec for spec in config.get_quant_method(LINEAR, "x").weight_specs(shape)}
    in_order = (torch.arange(64) // 32).to(torch.int32)
    assert specs["g_idx"].refuse(in_order, shape) is None
    assert "do not lie in order" in specs["g_idx"].refuse(in_order.flip(0), shape)
    assert specs["qzeros"].refuse(torch.full((2, 4), 0x77777777, dtype=torch.int32), shape) is None
    assert "sym: true" in specs["qzeros"].refuse(torch.full((2, 4), 0x66666666, dtype=torch.int32), shape)
    ordered = act_order_config().get_quant_method(LINEAR, "x")
    specs = {spec.name: spec for spec in ordered.weight_specs(shape)}
    assert "groups 0 to 2" in specs["g_idx"].refuse(torch.arange(3, dtype=torch.int32), shape)
    assert issubclass(CheckpointError, ValueError)


GOLDEN = sorted((Path(__file__).parents[2] / "quantization").glob("*/golden/**/*.safetensors"))
GOLDEN = [
    path for path in GOLDEN if path.parents[1].name in ("gptq", "compressed_tensors") or path in ACT_ORDER
]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_writers_store_is_never_refused(path):
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    config = read(case["quantization_config"])
    config.see_checkpoint({f"x.{name}": tensor for name, tensor in tensors.items()})
    shape = LinearShape(
        Span.full(case["in_features"]), (Span.full(case["out_features"]),), ("x",), torch.float32
    )
    for spec in config.get_quant_method(LINEAR, "x").weight_specs(shape):
        assert spec.refuse is None or spec.refuse(tensors[spec.name], shape) is None, spec.name


def test_act_order_of_a_single_group_is_no_order():
    method = read({**GPTQ, "group_size": -1, "desc_act": True}).get_quant_method(LINEAR, "x")
    assert method.index == "absent" and method.fuses


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("sym", ("true", "false"))
def test_a_rule_rounds_to_the_nearest_code(bits, sym):
    method = get_quantization_config("gptq").from_options({"bits": str(bits), "group_size": "32", "sym": sym})
    shape = LinearShape(Span.full(64), (Span.full(16),), ("x",), torch.float32)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    made = method.quantize(weight, shape)
    step = made.scales.float().repeat_interleave(32, dim=1)
    # Half a step, and the scale's rounding to float16 (2^-11) over as many as 2^7 codes.
    assert ((made.dequantize(torch.float32) - weight).abs() <= (0.5 + 2**-4 + 1e-3) * step).all()
    assert made.type.symmetric is (sym == "true") and made.bits == bits


def test_a_rule_with_bits_that_gptq_lacks_is_an_error():
    with pytest.raises(ConfigError, match="2, 3, 4, 8"):
        get_quantization_config("gptq").from_options({"bits": "5"})


# AutoRound

AUTO = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}


@pytest.mark.parametrize(
    ("packing", "name", "minus_one"),
    [
        ("auto_round:auto_gptq", "gptq", True),
        ("auto_gptq", "gptq", True),
        ("auto_round", "gptq", False),
        ("auto_round:gptqmodel", "gptq", False),
        ("auto_round:auto_awq", "awq", None),
        ("auto_awq", "awq", None),
    ],
)
def test_autorounds_packing_names_the_format_of_the_tensors(packing, name, minus_one):
    method = read({**AUTO, "packing_format": packing}).get_quant_method(LINEAR, "model.layers.0.mlp.up_proj")
    assert method.name == name and method.group_size == 32
    assert getattr(method, "zeros_minus_one", None) is minus_one


@pytest.mark.parametrize(
    ("config", "described"),
    [
        (
            {
                "data_type": "nv_fp",
                "bits": 4,
                "group_size": 16,
                "act_bits": 4,
                "act_data_type": "nv_fp4_with_static_gs",
            },
            "nvfp4",
        ),
        ({"data_type": "mx_fp", "bits": 4, "act_bits": 4, "act_data_type": "mx_fp"}, "mxfp4"),
        ({"data_type": "mx_fp", "bits": 8, "act_bits": 16}, "mxfp8"),
        ({"data_type": "fp", "bits": 8, "group_size": 0}, "fp8 e4m3 per tensor, activations float"),
        (
            {"data_type": "fp", "bits": 8, "group_size": -1, "act_bits": 8, "act_dynamic": False},
            "per channel, activations static",
        ),
    ],
)
def test_autorounds_float_formats_are_those_of_their_data_type(config, described):
    packing = "fp8_static" if config["data_type"] == "fp" else "llm_compressor"
    read_config = read({**AUTO, **config, "packing_format": f"auto_round:{packing}"})
    assert described in read_config.get_quant_method(LINEAR, "model.layers.0.mlp.up_proj").describe()


def test_autorounds_extra_config_overrides_layers_by_name_and_pattern():
    config = read(
        {
            **AUTO,
            "block_name_to_quantize": "model.layers",
            "extra_config": {
                "model.layers.0.mlp.up_proj": {"bits": 8},
                r".*self_attn\.(q|k)_proj.*": {"bits": 16},
                "lm_head": {"bits": 4, "group_size": 64},
            },
        }
    )
    config.see_checkpoint({"lm_head.qweight": None})
    assert config.get_quant_method(LINEAR, "model.layers.0.mlp.up_proj").bits == 8
    assert config.get_quant_method(LINEAR, "model.layers.1.mlp.up_proj").bits == 4
    assert config.get_quant_method(LINEAR, "model.layers.1.self_attn.q_proj") is None
    assert config.get_quant_method(LINEAR, "model.visual.fc") is None
    assert config.get_quant_method(SimpleNamespace(kind="lm_head"), "lm_head").group_size == 64


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"packing_format": "auto_round:marlin"}, "packing_format", "marlin"),
        ({"packing_format": "auto_round:llm_compressor"}, "data_type", "int"),
        ({"data_type": "mx_fp"}, "packing_format", "auto_gptq"),
        ({"data_type": "mx_fp", "bits": 6}, "data_type", "6 bits of mx_fp"),
        ({"data_type": "fp", "bits": 4}, "bits", "4"),
        ({"data_type": "fp", "bits": 8, "group_size": [128]}, "group_size", "[128]"),
        ({"data_type": "fp", "bits": 8, "group_size": -1, "fmt": "e5m2"}, "fmt", "e5m2"),
        ({"weight_block_size": [64, 64]}, "weight_block_size", "[64, 64]"),
        ({"extra_config": {"a.b": {"act_bits": 8}}}, "extra_config.a.b.act_bits", "8"),
        ({"extra_config": [1]}, "extra_config", "[1]"),
    ],
)
def test_an_unreadable_autoround_config_names_field_and_value(change, field, value):
    with pytest.raises(ConfigError) as caught:
        read({**AUTO, **change})
    assert f"quantization_config.{field}" in str(caught.value) and value in str(caught.value)


def test_every_spelling_is_registered():
    assert issubclass(get_quantization_config("auto-round"), QuantizationConfig)
