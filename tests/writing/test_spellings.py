"""The spellings of GPTQ, ModelOpt and 4-bit floats: the bytes of their own writers, and decoders of their pages."""

from __future__ import annotations

import json

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.formats.gguf import GGUFLinearMethod

from ..checkpoints import load_tensors, relative_error, write_checkpoint
from ..conformance.vectors import ROOT, Vector, name_of
from ..forward import logits_of
from .layouts import decode_awq, decode_compressed, decode_gptq, decode_modelopt

BLOCKS = "model.layers.**"
FORMATS = ("awq", "gptq", "mxfp4", "modelopt", "gguf", "compressed_tensors")


def vectors() -> list[Vector]:
    found = []
    for name in FORMATS:
        found += [Vector(path) for path in sorted((ROOT / name / "golden").rglob("*.safetensors"))]
    return found


def writable(vector: Vector) -> bool:
    """Whether the method says that it can be written, and the vector is of one part."""
    try:
        vector.method.to_stored(vector.canonical, vector.shape)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("vector", vectors(), ids=name_of)
def test_what_the_writers_of_the_formats_stored_is_written_again(vector):
    if not writable(vector):
        pytest.skip("this layout is only read")
    made = vector.method.to_stored(vector.canonical, vector.shape)
    for spec in vector.method.weight_specs(vector.shape):
        found, expected = made[spec.name], vector.stored_for(spec)
        if spec.name == "qzeros" and getattr(vector.method, "symmetric", False):
            continue  # the page's constant; nothing was read
        if isinstance(vector.method, GGUFLinearMethod) and vector.method.kind.endswith("K"):
            again = vector.method.to_canonical({"weight": found}, vector.shape)
            assert torch.equal(again.dequantize(torch.float32), vector.canonical.dequantize(torch.float32))
            continue
        assert found.numel() == expected.numel(), spec.name
        found, expected = found.reshape(-1), expected.reshape(-1)
        if expected.dtype.is_floating_point and expected.element_size() == 2:
            found = found.to(expected.dtype)
        assert torch.equal(found.view(torch.uint8), expected.to(found.dtype).view(torch.uint8)), spec.name


def test_most_vectors_can_be_written():
    counts = {name: [writable(v) for v in vectors() if f"/{name}/" in str(v.path)] for name in FORMATS}
    assert all(counts["gptq"]) and all(counts["mxfp4"]) and all(counts["awq"])
    assert sum(counts["gguf"]) >= 11 and sum(counts["compressed_tensors"]) >= 10
    assert sum(counts["modelopt"]) >= 3


# Whole checkpoints


def layers_of(there) -> dict[str, torch.Tensor]:
    weights = there.model.state_dict()
    return {n.removesuffix(".weight"): w for n, w in weights.items() if ".layers." in n and w.ndim == 2}


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("rule", [":group_size=64", ":sym=false,group_size=32", ":bits=8,group_size=-1"])
def test_gptq_tensors_hold_what_rounding_to_nearest_says(format, rule, tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none-bf16")
    rules = {BLOCKS: f"gptq{rule}"}
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules, format=format)
    tensors, errors = load_tensors(tmp_path / "out"), {layer.prefix: layer.error for layer in written.layers}
    bits = 8 if "8" in rule else 4
    for name, weight in layers_of(there).items():
        found = decode_gptq(tensors, name, bits, format == "gptq")
        error = float((found - weight.double()).norm() / weight.double().norm())
        assert error == pytest.approx(errors[name], rel=1e-3) and error < (0.02 if bits == 8 else 0.12)
    settings = settings_of(tmp_path / "out")
    assert settings["checkpoint_format"] == format and settings["desc_act"] is False
    assert settings["sym"] == ("sym" not in rule) and settings["lm_head"] is False
    assert settings["dynamic"] is None
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == settings
    # The same rule while loading holds the same weights.
    direct = pymllm.load_model(there.folder, rules, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6


MIXED = [
    "model.layers.0.mlp.**=none",
    "**.mlp.down_proj=gptq:bits=8,group_size=32",
    "**.self_attn.q_proj=gptq:bits=3,group_size=-1",
    "**.mlp.**=gptq:bits=2,group_size=32,sym=false",
    "**.self_attn.**=gptq:group_size=64",
    "lm_head=gptq:group_size=32",
]


def test_layers_that_differ_are_dynamic_rules(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none", vocab_size=96)
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", MIXED)
    settings = settings_of(tmp_path / "out")
    assert written.spelling == "gptq_v2" and settings["lm_head"] is True  # as some have zero points
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 64, True)
    assert next(iter(settings["dynamic"])).startswith("-:") and len(settings["dynamic"]) == 8
    config = get_quantization_config("gptq").from_config(settings)
    stored = {layer.prefix: layer.method for layer in written.layers}
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    found = {name: d.method.describe() for name, d in model.prepared.quant.decisions.items()}
    assert {name: found[name] for name in stored} == stored and config.dynamic
    direct = pymllm.load_model(there.folder, MIXED, dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6


def test_awq_becomes_gptq_without_another_rounding(tmp_path):
    there = write_checkpoint(tmp_path / "in", "qwen2", "awq-g64")
    written = pymllm.quantize_checkpoint(
        there.folder, tmp_path / "out", {"**.o_proj": "gptq:group_size=32"}, format="gptq_v2"
    )
    tensors, stored = load_tensors(tmp_path / "out"), load_tensors(there.folder)
    for name in layers_of(there):
        if "o_proj" not in name:
            assert torch.equal(decode_gptq(tensors, name, 4, 0), decode_awq(stored, name))
    assert {layer.error for layer in written.layers if layer.rule is None} == {0.0}
    # And back again.
    pymllm.quantize_checkpoint(
        tmp_path / "out", tmp_path / "back", {"**.o_proj": "awq:group_size=64"}, format="awq"
    )
    again = load_tensors(tmp_path / "back")
    for name in layers_of(there):
        if "o_proj" not in name:
            assert torch.equal(again[f"{name}.qweight"], stored[f"{name}.qweight"])


@pytest.mark.parametrize(
    ("rules", "format", "needle"),
    [
        ({BLOCKS: "fp8"}, "gptq", "fp8 e4m3"),
        ({BLOCKS: "int8:activations=token"}, "gptq", r"quantised activations \(token\)"),
        ({BLOCKS: "gguf:type=Q4_1"}, "modelopt", "int4 g32"),
        ({"**": "gptq:group_size=32"}, "gptq", r"model\.embed_tokens=none"),
        ({"lm_head": "gptq:group_size=32"}, "gptq", "97 outputs of 4 bits"),
        ({BLOCKS: "fp8"}, "gptq_v2", "compressed-tensors"),
        ({BLOCKS: "fp8:granularity=tensor,activations=token"}, "modelopt", "granularity=channel"),
        ({BLOCKS: "mxfp4"}, "modelopt", "nvfp4"),
        ({BLOCKS: "nvfp4"}, "gptq", "e2m1"),
    ],
)
def test_what_these_spellings_cannot_hold_is_refused(rules, format, needle, tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules, format=format)
    assert not (tmp_path / "out").exists()


MODELOPT = {
    "nvfp4": "W4A16_NVFP4",
    "fp8": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8:granularity=block,activations=float": "FP8_PB_WO",
}


@pytest.mark.parametrize("rule", MODELOPT)
def test_modelopt_tensors_hold_weights_and_both_configs_say_how(rule, tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none-bf16", num_key_value_heads=4)
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {BLOCKS: rule}, format="modelopt")
    tensors, errors = load_tensors(tmp_path / "out"), {layer.prefix: layer.error for layer in written.layers}
    for name, weight in layers_of(there).items():
        found = decode_modelopt(tensors, name)
        error = float((found - weight.double()).norm() / weight.double().norm())
        assert error == pytest.approx(errors[name], rel=1e-3) and error < (0.12 if rule == "nvfp4" else 0.03)
    settings = settings_of(tmp_path / "out")
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert settings["quant_method"] == "modelopt" and settings["ignore"] == ["lm_head"]
    assert settings["quant_algo"] == beside["quant_algo"] == MODELOPT[rule]
    assert beside["exclude_modules"] == ["lm_head"]
    direct = pymllm.load_model(there.folder, {BLOCKS: rule}, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6


def test_modelopt_mixes_algorithms_layer_by_layer(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    rules = {"**.mlp.**": "nvfp4", "**.o_proj": "none", BLOCKS: "fp8"}
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules, format="modelopt")
    settings = settings_of(tmp_path / "out")
    assert settings["quant_algo"] == "MIXED_PRECISION" and len(settings["quantized_layers"]) == 12
    assert settings["quantized_layers"]["model.layers.1.mlp.up_proj"] == {
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
    }
    direct = pymllm.load_model(there.folder, rules, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6


def test_compressed_tensors_reads_its_four_bit_floats(tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    there = write_checkpoint(tmp_path / "in", "llama", "none-bf16")
    rules = {"**.mlp.**": "nvfp4", BLOCKS: "mxfp4"}
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules)
    assert written.spelling == "compressed-tensors"
    settings, tensors = settings_of(tmp_path / "out"), load_tensors(tmp_path / "out")
    assert settings["format"] == "mixed-precision"
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    direct = pymllm.load_model(there.folder, rules, dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 1e-6
    groups = {group["format"]: group for group in settings["config_groups"].values()}
    for name, weight in layers_of(there).items():
        kind = f"{'nvfp4' if '.mlp.' in name else 'mxfp4'}-pack-quantized"
        scheme = QuantizationScheme(**groups[kind])
        state = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        theirs = BaseCompressor.get_value_from_registry(kind).decompress(state, scheme)["weight"].float()
        error = next(layer.error for layer in written.layers if layer.prefix == name)
        assert float((theirs - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.01)


def test_nvfp4_goes_from_one_spelling_to_the_other_unchanged(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    pymllm.quantize_checkpoint(there.folder, tmp_path / "a", {BLOCKS: "nvfp4"}, format="modelopt")
    pymllm.quantize_checkpoint(tmp_path / "a", tmp_path / "b", {"lm_head": "int8"})
    pymllm.quantize_checkpoint(tmp_path / "b", tmp_path / "c", {"lm_head": "none"}, format="modelopt")
    first, last = load_tensors(tmp_path / "a"), load_tensors(tmp_path / "c")
    for name in first:
        if ".layers." in name:
            assert torch.equal(first[name].float(), last[name].float()), name
    name = "model.layers.0.mlp.up_proj"
    assert decode_compressed(load_tensors(tmp_path / "b"), "lm_head", 8).shape == (97, 128)
    assert load_tensors(tmp_path / "b")[f"{name}.weight_packed"].dtype is torch.uint8
