"""compressed-tensors in the wild: quantised embeddings and heads, groups for attention, folded rotations, mixtures."""

import copy
from dataclasses import dataclass

import pytest
import torch

import pymllm
from pymllm.errors import ConfigError
from pymllm.quantization.base import get_quantization_config

from ..checkpoints import edit_config, relative_error, save_tensors, write_checkpoint
from ..forward import TOLERANCE, assert_answers_as_meant, llm_logits_of
from .test_compressed_tensors import FP8, W4, W8, settings

EMBED = "model.embed_tokens"


@dataclass(frozen=True)
class PackedInt4:
    """int4 in groups of 32, packed."""

    def config(self, ignored):
        return settings(W4, "pack-quantized", ignore=["lm_head", *ignored])

    def encode(self, weight):
        groups = weight.unflatten(1, (-1, 32))
        scales = groups.abs().amax(-1) / 7.5
        codes = (groups / scales[..., None]).round().clamp(-8, 7)
        nibbles = (codes.flatten(1) + 8).to(torch.int64).unflatten(1, (-1, 8))
        words = (nibbles << (4 * torch.arange(8))).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        stored = {"weight_packed": words, "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        return stored, (codes * scales[..., None]).flatten(1)


def quantised(weight, kind):
    """The stored tensors of a table [V, H] with a scale for each row, and the float32 table that they mean."""
    if kind == "float-quantized":
        scales = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scales).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scales}, codes.float() * scales
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    meant = codes.float() * scales
    if kind == "int-quantized":
        return {"weight": codes, "weight_scale": scales}, meant
    raised = (codes.to(torch.int16) + 128).to(torch.uint8)
    shape = torch.tensor(weight.shape, dtype=torch.int32)
    return {"weight_packed": raised.view(torch.int32), "weight_scale": scales, "weight_shape": shape}, meant


@pytest.mark.parametrize(
    ("kind", "tied", "target"),
    (
        ("pack-quantized", True, "Embedding"),
        ("pack-quantized", False, "re:.*embed_tokens$"),
        ("int-quantized", True, EMBED),
        ("float-quantized", True, "re:.*embed_tokens$"),
        ("float-quantized", False, "Embedding"),
    ),
)
def test_embeddings_and_their_tied_heads_are_read_as_stored(kind, tied, target, tmp_path):
    written = write_checkpoint(tmp_path, "llama", tie_word_embeddings=tied, vocab_size=96)
    weights = FP8 if kind == "float-quantized" else W8
    tensors, names = dict(written.tensors), [EMBED] if tied else [EMBED, "lm_head"]
    with torch.no_grad():
        for name in names:
            stored, meant = quantised(tensors.pop(f"{name}.weight"), kind)
            tensors |= {f"{name}.{key}": value for key, value in stored.items()}
            written.model.get_parameter(f"{name}.weight").copy_(meant)
    save_tensors(tmp_path, tensors)
    activations = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
    config = settings(weights, kind, None if kind == "pack-quantized" else activations, [target, "lm_head"])
    edit_config(tmp_path, quantization_config=config)
    written.__dict__.pop("tensors", None)
    assert_answers_as_meant(written)
    plan = pymllm.plan(tmp_path, device="cpu")
    assert all("8" in plan.layer(name).method_detail for name in (EMBED, "lm_head"))


def attention_group(target, **more):
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return {"targets": [target], "weights": None, "format": "dense", "input_activations": static} | more


@pytest.mark.parametrize(
    ("target", "scheme"), (("LlamaAttention", True), ("LlamaAttention", False), ("re:.*self_attn", False))
)
def test_a_group_without_weights_is_for_attention_and_leaves_the_layers_as_they_are(target, scheme, tmp_path):
    written = write_checkpoint(tmp_path, "llama", PackedInt4())
    config = settings(W4, "pack-quantized", ignore=["lm_head"])
    config["config_groups"]["attention"] = group = attention_group(target)
    config["kv_cache_scheme"] = group["input_activations"] if scheme else None
    edit_config(tmp_path, quantization_config=config)
    scales = {
        f"model.layers.{layer}.self_attn.{name}_{what}": value
        for layer in range(2)
        for name in "qkv"
        for what, value in (
            ("scale", torch.tensor([0.03])),
            ("zero_point", torch.zeros(1).to(torch.float8_e4m3fn)),
        )
    }
    save_tensors(tmp_path, written.tensors | scales)
    assert relative_error(llm_logits_of(written, compute="exact"), written.logits()) <= TOLERANCE
    plan = pymllm.plan(tmp_path, device="cpu")
    attention = [layer for layer in plan.layers if layer.kind == "attention"]
    assert all("fp8" in layer.method and "scale 1" not in layer.method_detail for layer in attention)
    assert any("scale of queries" in note for note in plan.notes)


def test_the_linear_layers_of_a_group_without_weights_stay_refused():
    config = settings()
    config["config_groups"]["group_0"] |= {"weights": None}
    with pytest.raises(ConfigError, match=r"group_0\.weights"):
        get_quantization_config("compressed-tensors").from_config(config)


ROTATION = {"type": "hadamard", "head_dim": None, "apply": []}


def transforms(*locations):
    applied = [{"location": location, "targets": ["Linear"], "inverse": False} for location in locations]
    return {"config_groups": {"R1": ROTATION | {"apply": applied}}}


def test_rotations_that_are_folded_into_weights_are_said_to_be(tmp_path):
    written = write_checkpoint(tmp_path, "llama", PackedInt4())
    edit_config(
        tmp_path, quantization_config={"transform_config": transforms("weight_input", "weight_output")}
    )
    assert relative_error(llm_logits_of(written, compute="exact"), written.logits()) <= TOLERANCE
    assert any("R1" in note and "folded" in note for note in pymllm.plan(tmp_path, device="cpu").notes)


@pytest.mark.parametrize("location", ("input", "output", "q_attn", "k_cache", "attn", None))
def test_rotations_of_activations_are_refused_by_name(location):
    config = settings(transform_config=transforms("weight_input", location))
    with pytest.raises(ConfigError, match=r"R1.apply\[1\].location") as caught:
        get_quantization_config("compressed-tensors").from_config(config)
    assert repr(location) in str(caught.value)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16))
def test_a_stored_shape_may_have_any_dtype_of_integers(dtype, tmp_path):
    written = write_checkpoint(tmp_path, "llama", PackedInt4(), intermediate_size=192)
    tensors = copy.copy(written.tensors)
    for name in [name for name in tensors if name.endswith("weight_shape")]:
        tensors[name] = tensors[name].to(dtype)
    save_tensors(tmp_path, tensors)
    assert relative_error(llm_logits_of(written, compute="exact"), written.logits()) <= TOLERANCE
