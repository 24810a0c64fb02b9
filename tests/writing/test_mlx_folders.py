"""Folders for mlx-lm: what they hold by the layout's page, its config keys, and the way there and back.

Legend: O out_features, I in_features, E experts.
"""

import json

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError

from ..checkpoints import load_tensors, write_checkpoint
from ..forward import logits_of
from ..mlx_checkpoints import decode
from ..moe_checkpoints import write_moe


def settings_of(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert "quant_method" not in config["quantization"]
    return config["quantization"]


def layer_of(tensors, name):
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def logits(folder, checkpoint):
    model = pymllm.load_model(folder, device="cpu", dtype="float32")
    return logits_of(model, checkpoint.ids)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


RULES = {
    "**.v_proj": "mlx:bits=8,group_size=128",
    "**.o_proj": "mlx:mode=mxfp4",
    "**.down_proj": "mlx:mode=nvfp4",
    "**.gate_proj": "mlx:mode=mxfp8",
    "**.up_proj": "none",
    "**": "mlx:bits=3,group_size=32",
}


def test_a_folder_holds_every_setting_and_pymllm_reads_it_back(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama", "none-bf16")
    written = pymllm.quantize_checkpoint(source.folder, tmp_path / "out", RULES)
    assert written.spelling == "mlx", "all rules ask for it"
    quantization, tensors = settings_of(tmp_path / "out"), load_tensors(tmp_path / "out")
    assert {key: quantization[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 3,
        "mode": "affine",
    }
    assert quantization["model.layers.1.self_attn.o_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert not any("up_proj" in name or "q_proj" in name for name in quantization)
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype is torch.bfloat16
    assert tensors["model.embed_tokens.scales"].dtype is torch.bfloat16, "as the model's floats"
    assert sorted(layer_of(tensors, "lm_head")) == ["biases", "scales", "weight"]
    state = source.model.state_dict()
    for layer in written.layers:
        if layer.method == "none":
            continue
        setting = quantization.get(layer.prefix, quantization)
        found = decode(layer_of(tensors, layer.prefix), setting["bits"], setting["mode"])
        assert relative(found, state[f"{layer.prefix}.weight"]) == pytest.approx(layer.error, rel=1e-4), layer
        state[f"{layer.prefix}.weight"].copy_(found.float())
    assert relative(logits(tmp_path / "out", source), source.logits()) < 1e-5
    assert pymllm.verify(tmp_path / "out", device="cpu").ok


def test_integers_of_other_methods_keep_their_values_and_come_back(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama", "awq-g64")
    # Nothing is rounded: the layers stay int4 with zero points.
    pymllm.quantize_checkpoint(source.folder, tmp_path / "out", {"lm_head": "none"}, format="mlx")
    tensors = load_tensors(tmp_path / "out")
    assert settings_of(tmp_path / "out") == {"group_size": 64, "bits": 4, "mode": "affine"}
    state = source.model.state_dict()
    for name in source.linears:
        found = decode(layer_of(tensors, name), 4)
        assert relative(found, state[f"{name}.weight"]) < 1e-7, name
    assert relative(logits(tmp_path / "out", source), source.logits()) < 1e-5
    rules = {"**.layers.**": "int8:group_size=64"}
    back = pymllm.quantize_checkpoint(tmp_path / "out", tmp_path / "back", rules)
    assert back.spelling == "compressed-tensors"
    assert 0 < max(layer.error for layer in back.layers) < 0.01, "eight bits over four"
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization" not in config


def test_float_zero_points_and_calibrated_integers_are_held(tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama", "none-bf16")
    rules = {"**.mlp.**": "int4:group_size=32,scale=hqq", "**.self_attn.**": "int8:group_size=64"}
    written = pymllm.quantize_checkpoint(source.folder, tmp_path / "out", rules, format="mlx")
    tensors, state = load_tensors(tmp_path / "out"), source.model.state_dict()
    for layer in written.layers:
        if layer.rule is not None:
            found = decode(layer_of(tensors, layer.prefix), 4 if "int4" in layer.method else 8)
            assert relative(found, state[f"{layer.prefix}.weight"]) == pytest.approx(layer.error, rel=1e-4)


@pytest.mark.parametrize("family", ("qwen3_moe", "mixtral"))
def test_experts_are_stacked_in_the_order_of_their_numbers(family, tmp_path):
    source = write_moe(tmp_path / "source", family, "none-bf16")
    rules = {"**.experts.**": "mlx:bits=4,group_size=32"}
    written = pymllm.quantize_checkpoint(source.folder, tmp_path / "out", rules)
    tensors = load_tensors(tmp_path / "out")
    assert not any(".experts." in name for name in tensors)
    block = "model.layers.0.block_sparse_moe" if family == "mixtral" else "model.layers.0.mlp"
    originals = load_tensors(source.folder)
    names = {"gate_proj": "w1", "down_proj": "w2"} if family == "mixtral" else {"up_proj": "up_proj"}
    for name, own in names.items():
        found = decode(layer_of(tensors, f"{block}.switch_mlp.{name}"), 4)
        for expert, weight in enumerate(found):
            assert relative(weight, originals[f"{block}.experts.{expert}.{own}.weight"]) < 0.12
    changed = [layer for layer in written.layers if layer.rule is not None]
    assert {layer.method for layer in changed} == {"mlx int4 g32"}
    # The same as loading the source with the rule, but for scales: here they are in the model's dtype.
    ruled = pymllm.load_model(
        source.folder,
        device="cpu",
        dtype="float32",
        quant={"**.experts.**": "mlx:bits=4,group_size=32,scales=bfloat16"},
    )
    assert relative(logits(tmp_path / "out", source), logits_of(ruled, source.ids)) < 1e-5


@pytest.mark.parametrize(
    ("rules", "said"),
    (
        ({"**.mlp.**": "int8"}, "groups of"),
        ({"**.mlp.**": "int4:group_size=16"}, "groups of 16"),
        ({"**.mlp.**": "fp8"}, "fp8"),
        ({"**.mlp.**": "nvfp4"}, "second scale"),
    ),
)
def test_what_the_layout_has_no_place_for_is_refused_before_anything_is_written(rules, said, tmp_path):
    source = write_checkpoint(tmp_path / "source", "llama", "none-bf16")
    with pytest.raises(ConfigError, match=f"mlx spelling cannot hold .*{said}"):
        pymllm.quantize_checkpoint(source.folder, tmp_path / "out", rules, format="mlx")
    assert not (tmp_path / "out").exists()


def test_experts_of_a_layer_that_differ_cannot_be_stacked(tmp_path):
    source = write_moe(tmp_path / "source", "qwen3_moe", "none-bf16")
    with pytest.raises(ConfigError, match="all experts of a layer in one tensor"):
        pymllm.quantize_checkpoint(source.folder, tmp_path / "out", {"**.experts.3.up_proj": "mlx"})
