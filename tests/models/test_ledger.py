"""Each tensor of checkpoints of types without a page, with a fault in turn: one error names it, from headers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymllm
from pymllm.errors import CheckpointError
from pymllm.loading.match import match
from pymllm.loading.prepare import prepare
from pymllm.models import rename_tensors
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.opening import open_checkpoint

from ..generic.zoo import small
from .tiny import IDS, logits, make, save

TYPES = ("smollm3", "glm4_moe", "granitemoehybrid", "nemotron_h", "gemma3", "qwen3_5")
# How a second spelling of a name begins, by how the stored one does.
SPELLINGS = {
    "language_model.model.": "model.language_model.",
    "model.language_model.": "language_model.model.",
    "model.": "",
    "backbone.": "model.",
}


def is_text(name):
    return not any(word in name for word in ("vision", "visual", "projector"))


@pytest.fixture(scope="module", params=TYPES)
def prepared(request, tmp_path_factory):
    folder = save(make(request.param), tmp_path_factory.mktemp(request.param))
    return prepare(folder, device="cpu", dtype="float32")


def error_of(prepared, change):
    """Return what is said of a checkpoint whose tensors `change` has changed; None: nothing is wrong."""
    checkpoint = open_checkpoint(prepared.checkpoint.path, {})
    change(checkpoint.tensors)
    try:
        rename_tensors(checkpoint, prepared.config)
        match(prepared.model, prepared.quant, checkpoint)
    except CheckpointError as error:
        return error
    return None


def stored(prepared):
    return dict(open_checkpoint(prepared.checkpoint.path, {}).tensors)


def assert_each_is_named(prepared, names, change):
    unnamed = {}
    for name in names:
        error = error_of(prepared, lambda tensors, name=name: change(tensors, name))
        if error is None or name not in str(error):
            unnamed[name] = str(error)[:200]
    assert not unnamed


def test_without_a_fault_nothing_is_wrong(prepared):
    assert error_of(prepared, lambda tensors: None) is None


def test_each_tensor_that_is_left_out_is_named(prepared):
    assert_each_is_named(prepared, filter(is_text, stored(prepared)), lambda tensors, name: tensors.pop(name))


def test_each_tensor_under_another_name_is_named_and_so_is_the_place_it_left(prepared):
    def rename(tensors, name):
        info = tensors.pop(name)
        tensors[f"{name}x"] = replace(info, name=f"{name}x")

    silent = {}
    for name in stored(prepared):
        said = str(error_of(prepared, lambda tensors, name=name: rename(tensors, name)))
        if f"{name}x" not in said or (is_text(name) and f"{name}: " not in said):
            silent[name] = said[:200]
    assert not silent


def test_each_tensor_that_is_there_in_a_second_spelling_is_named(prepared):
    def double(tensors, name):
        before, after = next((b, a) for b, a in SPELLINGS.items() if name.startswith(b))
        other = after + name.removeprefix(before)
        tensors[other] = replace(tensors[name], name=other)

    doubled = [n for n in stored(prepared) if is_text(n) and n.startswith(tuple(SPELLINGS))]
    assert len(doubled) > 10
    unnamed = {}
    for name in doubled:
        error = error_of(prepared, lambda tensors, name=name: double(tensors, name))
        if error is None or name.partition("layers.")[2] not in str(error):
            unnamed[name] = str(error)[:200]
    assert not unnamed


def test_each_tensor_of_another_shape_is_named(prepared):
    def cut(tensors, name):
        info = tensors[name]
        tensors[name] = replace(info, shape=(info.shape[0] - 1, *info.shape[1:]))

    assert_each_is_named(prepared, filter(is_text, stored(prepared)), cut)


def test_each_tensor_of_another_dtype_is_named(prepared):
    def change(tensors, name):
        tensors[name] = replace(tensors[name], dtype_name="I32", torch_dtype=torch.int32)

    assert_each_is_named(prepared, filter(is_text, stored(prepared)), change)


def test_experts_that_lie_in_one_tensor_of_the_class_are_put_in_by_their_numbers(tmp_path):
    """Names of a file are in alphabetic order: experts.10 comes before experts.2."""
    model = make("nemotron_h")
    found = pymllm.LLM(save(model, tmp_path), device="cpu", dtype="float32", progress=False).logits(IDS)
    expected = logits(model)
    assert (found - expected).norm() / expected.norm() < 2e-6


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("nemotron_h", "backbone.layers.1.mixer.experts.10.up_proj.weight"),
        ("nemotron_h", "backbone.layers.1.mixer.gate.e_score_correction_bias"),
        ("glm4_moe", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("gemma3", "language_model.model.layers.1.input_layernorm.weight"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.A_log"),
    ],
)
def test_a_value_that_is_no_number_names_the_stored_tensor(model_type, name, tmp_path):
    tensors = load_file(save(make(model_type), tmp_path) / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        pymllm.load_model(tmp_path, device="cpu", dtype="float32")
    assert (caught.value.code, caught.value.tensor) == ("bad-value", name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt_neox", "embed_out.weight"),
        ("llava", "language_model.lm_head.weight"),
        ("ernie4_5_moe", "model.layers.2.mlp.gate.weight"),
        ("ernie4_5_moe", "model.layers.2.mlp.moe_statics.e_score_correction_bias"),
        ("zamba2", "model.layers.3.linear.weight"),
    ],
)
def test_a_missing_tensor_has_the_name_that_it_would_be_stored_under(model_type, name, tmp_path):
    made = small(model_type)
    made.settings["tie_word_embeddings"] = False
    made.model().save_pretrained(tmp_path)
    prepared = prepare(tmp_path, device="cpu", dtype="float32")
    said = str(error_of(prepared, lambda tensors: tensors.pop(name)))
    assert f", {name}: missing" in said


def test_layers_that_share_tensors_keep_their_names():
    tied = [(f"layers.{i}.shared.proj.weight", "layers.1.shared.proj.weight") for i in (1, 3)]
    names = ModuleNames(tied)
    assert names.of("layers.3.shared.proj") == ("layers.3.shared.proj",)
    assert names.of("layers.3.linear") == ("layers.3.linear",)
    assert names.tensor("layers.3.shared.proj.weight") == "layers.1.shared.proj.weight"
