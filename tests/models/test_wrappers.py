"""Wrappers of images and text: their text model answers as the whole does, and the rest is skipped for a reason."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pymllm
from pymllm.api import LLM
from pymllm.errors import CheckpointError, ConfigError
from pymllm.loading.prepare import prepare

from .tiny import IDS, TEXT, edit_config, logits, make, save

WRAPPERS = ("gemma3", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "cohere2_vision", "gemma4")
PAGES = {"gemma3": "pymllm.models.gemma3_text", "mistral3": "pymllm.models.mistral"}
EXACT = {"device": "cpu", "dtype": "float32", "compute": "exact", "progress": False}
# float32 sums in another order.
TOLERANCE = 2e-6


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def rewrite(folder, change):
    """Store the tensors of a folder under other names.  change: of names; None leaves one out."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request, tmp_path_factory):
    model = make(request.param)
    return request.param, model, save(model, tmp_path_factory.mktemp(request.param))


def test_the_text_model_answers_as_the_whole_and_the_rest_has_a_reason(wrapper):
    model_type, model, folder = wrapper
    llm = LLM(folder, **EXACT)
    assert distance(llm.logits(IDS), logits(model)) < TOLERANCE
    if model_type in PAGES:
        assert llm.model.definition == PAGES[model_type]
    reasons = {record.name: record.reason for record in llm.model.load_report.tensors if record.reason}
    known = ("the vision tower is not run", "the projector is not run", "shared with", "which is tied to it")
    assert all(reason.endswith(known) or reason.startswith(known) for reason in reasons.values())
    vision = [
        name for name in load_file(folder / "model.safetensors") if "vision_" in name or "visual" in name
    ]
    assert all(name in reasons for name in vision) and (vision or model_type == "gemma4")


def test_greedy_tokens_are_those_of_the_whole_model(tmp_path):
    model = make("qwen3_vl")
    llm = LLM(save(model, tmp_path), **EXACT)
    expected = list(IDS)
    with torch.no_grad():
        for _ in range(5):
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    sampling = pymllm.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    assert list(llm.generate([IDS], sampling)[0].token_ids) == expected[len(IDS) :]


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_both_spellings_of_names_are_read(spelling, tmp_path):
    model = make("mistral3")
    folder = save(model, tmp_path)
    heads = {"language_model.model.": "language_model.lm_head.", "model.language_model.": "lm_head."}

    def respell(name):
        for before, head in heads.items():
            if name.startswith(before):
                return spelling + name.removeprefix(before)
            if name.startswith(head):
                return heads[spelling] + name.removeprefix(head)
        return name

    rewrite(folder, respell)
    assert distance(LLM(folder, **EXACT).logits(IDS), logits(model)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_rules_and_swaps_take_the_stored_name_the_class_s_and_the_short_one(model_type, tmp_path):
    folder = save(make(model_type), tmp_path)
    stored = next(
        name for name in load_file(folder / "model.safetensors") if name.endswith("0.mlp.up_proj.weight")
    )
    spellings = {
        "model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp.up_proj",
        stored.removesuffix(".weight"),
    }
    for spelling in spellings:
        plan = pymllm.plan(folder, {spelling: "int8"}, device="cpu")
        assert [layer.prefix for layer in plan.layers if layer.method == "int8"] == [
            "model.layers.0.mlp.up_proj"
        ]
        llm = LLM(folder, **EXACT)
        assert list(pymllm.swap(llm.model, spelling, "int8").changed) == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_what_is_quantised_keeps_names_config_and_the_parts_that_are_not_run(model_type, tmp_path):
    folder = save(make(model_type), tmp_path / "source")
    rules = {"**.mlp.**": "int8"}
    pymllm.quantize_checkpoint(folder, tmp_path / "out", rules)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert {name.rpartition(".")[0] for name in before} == {name.rpartition(".")[0] for name in after}
    for name, tensor in before.items():
        assert ("language_model" in name and ".mlp." in name) or torch.equal(after[name], tensor)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == json.loads(
        (folder / "config.json").read_text()
    )
    ignored = config["quantization_config"]["ignore"]
    assert any("vision" in module or "visual" in module for module in ignored)
    found, expected = LLM(tmp_path / "out", **EXACT), LLM(folder, rules, **EXACT)
    assert distance(found.logits(IDS), expected.logits(IDS)) < TOLERANCE
    assert pymllm.verify(tmp_path / "out", device="cpu").ok


def test_a_config_may_call_layers_by_any_of_their_names(tmp_path):
    """Two groups whose weights are stored alike, so that only the config tells which layer rounds activations."""
    folder = save(make("gemma3"), tmp_path / "source")
    pymllm.quantize_checkpoint(folder, tmp_path / "out", {"**.mlp.**": "int8:group_size=-1"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = config["quantization_config"]
    (group,) = settings["config_groups"].values()
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    for prefix in ("model", "model.language_model", "language_model.model"):
        settings["config_groups"] = {
            "plain": {**group, "targets": ["Linear"]},
            "rounding": {**group, "targets": [f"{prefix}.layers.1.mlp.up_proj"], "input_activations": inputs},
        }
        edit_config(tmp_path / "out", quantization_config=settings)
        rules = prepare(tmp_path / "out", device="cpu").quant
        rounding = [
            name for name, d in rules.decisions.items() if getattr(d.method, "activations", "") == "token"
        ]
        assert rounding == ["model.layers.1.mlp.up_proj"]


def test_settings_in_the_text_config_are_read(tmp_path):
    folder = save(make("mistral3"), tmp_path / "source")
    pymllm.quantize_checkpoint(folder, tmp_path / "out", {"**.mlp.**": "int8"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = LLM(tmp_path / "out", **EXACT).logits(IDS)
    inner = {**config["text_config"], "quantization_config": config.pop("quantization_config")}
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "text_config": inner}))
    assert torch.equal(LLM(tmp_path / "out", **EXACT).logits(IDS), expected)


def test_layers_that_predict_further_tokens_are_skipped_for_a_reason(tmp_path):
    folder = save(make("qwen3_5"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "mtp.fc.weight": torch.zeros(32, 64),
        **{
            f"mtp.layers.0.{name.partition('layers.1.')[2]}": tensor.clone()
            for name, tensor in tensors.items()
            if "language_model.layers.1." in name
        },
    }
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    records = {record.name: record.reason for record in prepare(folder, device="cpu").records}
    assert {records[name] for name in extra} == {"a layer that predicts further tokens, which is not run"}


@pytest.mark.parametrize(("extra", "skipped"), [("eh_proj", True), (None, False)])
def test_a_layer_after_the_last_is_skipped_only_if_it_predicts_further_tokens(extra, skipped, tmp_path):
    folder = save(make("glm4_moe"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    more |= {} if extra is None else {f"model.layers.2.{extra}.weight": torch.zeros(32, 64)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_nextn_predict_layers=1)
    if skipped:
        records = {record.name: record.reason for record in prepare(folder, device="cpu").records}
        assert {records[name] for name in more} == {"a layer that predicts further tokens, which is not run"}
        return
    with pytest.raises(CheckpointError, match=r"layers\.2\..*unexpected"):
        prepare(folder, device="cpu")


def test_a_pattern_of_the_class_takes_nothing_of_a_layer_that_runs(tmp_path):
    """GLM-4's class leaves out layers 46 and 92, which are further tokens' in two of its sizes alone."""
    folder = save(make("glm4_moe"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.46.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(32, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        prepare(folder, device="cpu")


def test_a_type_that_is_unknown_runs_by_its_architecture_and_code_of_its_own_does_not(tmp_path):
    model = make("smollm3")
    folder = save(model, tmp_path)
    edit_config(folder, model_type="somebodys")
    assert distance(LLM(folder, **EXACT).logits(IDS), logits(model)) < TOLERANCE
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_somebodys.SomebodysForCausalLM"})
    with pytest.raises(ConfigError, match="somebodys"):
        prepare(folder, device="cpu")


def test_a_wrapper_that_transformers_does_not_know_runs_the_text_model_that_it_names(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    folder = save(model, tmp_path)
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "somebodys_chat", "architectures": ["SomebodysChatModel"], "llm_config": text}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {f"language_model.{name}": t for name, t in load_file(folder / "model.safetensors").items()}
    tensors |= {
        "vision_model.encoder.layers.0.attn.qkv.weight": torch.zeros(8, 8),
        "mlp1.0.weight": torch.zeros(8),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    llm = LLM(folder, **EXACT)
    assert distance(llm.logits(IDS), logits(model)) < TOLERANCE
    reasons = {record.name: record.reason for record in llm.model.load_report.tensors}
    assert "outside of language_model" in reasons["mlp1.0.weight"]
    second = {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}
    save_file(tensors | second, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        prepare(folder, device="cpu")
