"""gpt-oss in its own MXFP4 layout: read by transformers and by this package."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import pymllm
from pymllm.errors import ConfigError

from ..checkpoints import load_tensors, relative_error, write_checkpoint
from ..forward import logits_of
from ..gguf_models import write_model
from ..moe_checkpoints import encode_mxfp4, write_moe

EXPERTS = {"**.experts.**": "mxfp4"}


def transformers_reading(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    return (
        model.float()
    )  # before 5.21 the experts are bfloat16, whatever is asked for; no code is rounded by it


def distance(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).norm() / weight.norm())


def logits_of_transformers(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0]


def test_transformers_reads_the_experts_that_rounding_gives(tmp_path):
    there = write_moe(tmp_path / "in", "gpt_oss", "none")
    written = pymllm.quantize_checkpoint(there.folder, tmp_path / "out", EXPERTS)
    assert written.spelling == "mxfp4" and len(written.layers) == 2 * (5 * 3 + 4 + 1) + 2
    tensors, sizes = load_tensors(tmp_path / "out"), (5, 256, 4, 16)
    blocks = tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"]
    scales = tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    assert (blocks.dtype, blocks.shape) == (torch.uint8, sizes) and scales.shape == sizes[:3]
    theirs, ours = (
        transformers_reading(tmp_path / "out"),
        pymllm.load_model(tmp_path / "out", dtype="float32"),
    )
    assert relative_error(logits_of(ours, there.ids), logits_of_transformers(theirs, there.ids)) < 1e-5
    weights = there.model.state_dict()
    for name, weight in theirs.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored = weights[name].transpose(1, 2)  # [E, O, I]
            floored = torch.stack([encode_mxfp4(one)[2] for one in stored])
            assert 0 < distance(weight.transpose(1, 2), stored) <= distance(floored, stored), name
        else:
            assert torch.equal(weight, weights[name]), name
    direct = pymllm.load_model(there.folder, EXPERTS, dtype="float32", compute="exact")
    exact = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    assert relative_error(logits_of(exact, there.ids), logits_of(direct, there.ids)) < 2e-6


def test_published_blocks_are_written_again_byte_for_byte(tmp_path):
    there = write_moe(tmp_path / "in", "gpt_oss", "mxfp4")
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {"**.q_proj": "none"}, format="mxfp4")
    before, after = load_tensors(there.folder), load_tensors(tmp_path / "out")
    assert any(name.endswith("_blocks") for name in before) and before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_experts_of_a_gguf_file_become_tensors_of_all(tmp_path):
    model = write_model(tmp_path / "m.gguf", "gpt_oss")
    pymllm.quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out", EXPERTS)
    down = model.state_dict()["model.layers.1.mlp.experts.down_proj"].transpose(1, 2)
    meant = torch.stack([encode_mxfp4(weight)[2] for weight in down])
    found = transformers_reading(tmp_path / "out").state_dict()
    rounded = found["model.layers.1.mlp.experts.down_proj"].transpose(1, 2)
    assert 0 < distance(rounded, down) <= distance(meant, down)
    biases = "model.layers.1.mlp.experts.gate_up_proj_bias"
    assert torch.equal(found[biases], model.state_dict()[biases])


def test_a_layer_whose_experts_stay_floats_is_left_out(tmp_path):
    there = write_moe(tmp_path / "in", "gpt_oss", "none")
    rules = {"**.layers.0.mlp.experts.**": "mxfp4"}
    pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    left = settings["modules_to_not_convert"]
    assert "model.layers.1.mlp.experts" in left and "model.layers.0.mlp.experts" not in left
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(load_tensors(tmp_path / "out")[name], there.tensors[name])
    direct = pymllm.load_model(there.folder, rules, dtype="float32", compute="exact")
    model = pymllm.load_model(tmp_path / "out", dtype="float32", compute="exact")
    assert relative_error(logits_of(model, there.ids), logits_of(direct, there.ids)) < 2e-6


@pytest.mark.parametrize(
    ("rules", "needle"),
    [
        ({"**.q_proj": "mxfp4", **EXPERTS}, "q_proj.*mxfp4 for experts"),
        ({"**.experts.**": "int4:group_size=32"}, "mxfp4 for experts"),
        ({"**.experts.down_proj": "mxfp4"}, "all experts of a layer in MXFP4, or none"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_before_any_work(rules, needle, tmp_path):
    there = write_moe(tmp_path / "in", "gpt_oss", "none")
    with pytest.raises(ConfigError, match=needle):
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out", rules, format="mxfp4")
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tmp_path):
    there = write_checkpoint(tmp_path / "in", "llama", "none")
    with pytest.raises(ConfigError, match="gpt_oss, found llama"):
        pymllm.quantize_checkpoint(there.folder, tmp_path / "out", {"**.mlp.**": "mxfp4"}, format="mxfp4")
