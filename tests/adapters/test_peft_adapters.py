"""PEFT adapters on a model: logits as PEFT gives them, over every format, sharded, mixed in one batch, merged."""

# T tokens, V vocabulary, I in_features, O out_features

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pymllm
from pymllm.adapters import (
    enable_lora_for_model,
    load_lora_config,
    load_lora_weights,
    loaded_adapters,
    merge_lora_weights,
    unload_lora_weights,
    unmerge_lora_weights,
)
from pymllm.api import load_model
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import CheckpointError, ConfigError, RequestError
from pymllm.modules.layers import quantized_layers
from pymllm.parallel import simulate
from pymllm.swapping.swap import swap

from ..checkpoints import relative_error, write_checkpoint
from ..forward import logits_of
from .handwritten import adapter_for_shipped, random_adapter, with_deltas

GOLDEN = Path(__file__).with_name("golden")
BASE = GOLDEN / "base"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.name != "base")
# float32 sums in another order, through two layers.
TOLERANCE = 1e-5
each_case = pytest.mark.parametrize("case", CASES)


def golden(case):
    """(ids [T], PEFT's logits [T, V])."""
    stored = load_file(GOLDEN / case / "logits.safetensors")
    return stored["ids"], stored["logits"]


def base(**options):
    return load_model(BASE, device="cpu", dtype="float32", **options)


def copied(tmp_path, case, edit_tensors=None, **settings):
    """A copy of a golden adapter with other settings; None removes one."""
    folder = tmp_path / case
    folder.parent.mkdir(exist_ok=True)
    shutil.copytree(GOLDEN / case, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if edit_tensors is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


# --- as PEFT


@each_case
def test_logits_are_those_of_peft(case):
    ids, expected = golden(case)
    model = base()
    plain = logits_of(model, ids)
    adapter = load_lora_weights(model, GOLDEN / case)
    assert relative_error(logits_of(model, ids), expected) <= TOLERANCE
    assert relative_error(plain, expected) > 0.01, "the adapter must matter"
    assert loaded_adapters(model) == {"default": adapter} and adapter.nbytes > 0
    unload_lora_weights(model)
    assert torch.equal(logits_of(model, ids), plain) and not loaded_adapters(model)


@each_case
@pytest.mark.parametrize("size", (2, 4))
def test_logits_are_those_of_peft_on_several_ranks(case, size):
    """Two key heads, so that four ranks share each; a vocabulary of 41, padded."""
    ids, expected = golden(case)

    def work(_):
        model = base()
        load_lora_weights(model, GOLDEN / case)
        return logits_of(model, ids)

    for logits in simulate(size, work):
        assert relative_error(logits, expected) <= TOLERANCE


@each_case
def test_a_merged_adapter_gives_the_same_and_unmerging_restores_every_bit(case):
    ids, expected = golden(case)
    model = base()
    plain = logits_of(model, ids)
    load_lora_weights(model, GOLDEN / case)
    adapter = merge_lora_weights(model)
    assert relative_error(logits_of(model, ids), expected) <= TOLERANCE
    assert merge_lora_weights(model) is adapter, "merging twice does nothing"
    assert relative_error(logits_of(model, ids), expected) <= TOLERANCE
    assert set(adapter.unmerged) == ({"model.embed_tokens"} if case == "vocabulary" else set())
    unmerge_lora_weights(model)
    assert torch.equal(logits_of(model, ids), plain)


def test_pre_merged_weights_are_not_kept():
    ids, expected = golden("attention")
    model = base()
    load_lora_weights(model, GOLDEN / "attention", pre_merge_lora=True)
    assert relative_error(logits_of(model, ids), expected) <= TOLERANCE
    with pytest.raises(ConfigError, match="not kept"):
        unmerge_lora_weights(model)
    with pytest.raises(ConfigError, match="merged"):
        unload_lora_weights(model)


def test_merging_is_sharded_too():
    ids, expected = golden("stabilised")

    def work(_):
        model = base()
        load_lora_weights(model, GOLDEN / "stabilised", pre_merge_lora=True)
        return logits_of(model, ids)

    for logits in simulate(2, work):
        assert relative_error(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3", "gemma2", "phi3"))
def test_live_peft_agrees_on_every_family(tmp_path, family):
    """Tied embeddings, biases and norms of heads, projections that the checkpoint has in one tensor; needs peft."""
    peft = pytest.importorskip("peft")
    checkpoint = write_checkpoint(tmp_path / "m", family, tie_word_embeddings=True)
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    if family == "phi3":
        targets = ["qkv_proj", "gate_up_proj", "down_proj"]
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=targets)
    theirs = peft.get_peft_model(checkpoint.model, config)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            if "lora_B" in name:
                param.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        theirs.save_pretrained(tmp_path / "a")
        expected = theirs(checkpoint.ids[None], use_cache=False).logits[0]

    def work(_):
        model = load_model(checkpoint.folder, device="cpu", dtype="float32")
        load_lora_weights(model, tmp_path / "a")
        return logits_of(model, checkpoint.ids)

    for size in (1, 2):
        for logits in simulate(size, work):
            assert relative_error(logits, expected) <= 1e-4


# --- over quantised weights

QUANTISED = ("awq-g32", "fp8-block", "fp8-tensor", "ct-channel")


@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("size", (1, 2))
def test_over_quantised_weights_it_is_base_plus_product(tmp_path, fmt, size):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt)
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    expected = with_deltas(checkpoint, random_adapter(tmp_path / "a", checkpoint, targets))

    def work(_):
        model = load_model(checkpoint.folder, device="cpu", dtype="float32")
        adapter = load_lora_weights(model, tmp_path / "a", pre_merge_lora=True)
        return logits_of(model, checkpoint.ids), adapter.unmerged

    for logits, unmerged in simulate(size, work):
        assert relative_error(logits, expected) <= 1e-4
        assert len(unmerged) == 8 and all("quantised" in reason for reason in unmerged.values())


def test_parts_of_different_methods_take_adapters_and_merge_what_is_float(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32", ignored=("v_proj", "o_proj"))
    deltas = random_adapter(tmp_path / "a", checkpoint, ("q_proj", "v_proj", "o_proj"))
    model = load_model(checkpoint.folder, device="cpu", dtype="float32")
    adapter = load_lora_weights(model, tmp_path / "a")
    expected = with_deltas(checkpoint, deltas)
    assert relative_error(logits_of(model, checkpoint.ids), expected) <= 1e-4
    merge_lora_weights(model)
    assert sorted(adapter.unmerged) == [f"model.layers.{i}.self_attn.qkv_proj" for i in (0, 1)]
    assert relative_error(logits_of(model, checkpoint.ids), expected) <= 1e-4


def test_an_adapter_stays_when_its_layers_are_swapped(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", "awq-g32")
    deltas = random_adapter(tmp_path / "a", checkpoint, ("q_proj", "down_proj"))
    model = load_model(checkpoint.folder, device="cpu", dtype="float32")
    load_lora_weights(model, tmp_path / "a")
    swap(model, "**", "none")
    assert relative_error(logits_of(model, checkpoint.ids), with_deltas(checkpoint, deltas)) <= 1e-4
    merge_lora_weights(model)
    with pytest.raises(ConfigError, match="merged"):
        swap(model, "**.mlp.**", "fp8")


def test_adapters_go_on_a_module_that_quantize_model_filled():
    """transformers' own model with our layers inside."""
    ids, _ = golden("attention")
    model, reference = (
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval() for _ in range(2)
    )
    pymllm.quantize_model(model, "**.self_attn.*=int4:group_size=32", compute="exact")
    tensors, linears = load_file(GOLDEN / "attention" / "adapter_model.safetensors"), 0
    with torch.no_grad():
        for layer in quantized_layers(model):
            weight = layer.bound.canonical().dequantize(torch.float32)
            name = f"base_model.model.{layer.prefix}.lora_{{}}.weight"
            if name.format("A") in tensors:
                weight = weight + 4 * tensors[name.format("B")] @ tensors[name.format("A")]
                linears += 1
            reference.get_submodule(layer.prefix).weight.copy_(weight)
        adapter = load_lora_weights(model, GOLDEN / "attention")
        assert linears == len(adapter.layers) == 4
        assert relative_error(model(ids[None]).logits[0], reference(ids[None]).logits[0]) <= 1e-4
    assert len(merge_lora_weights(model).unmerged) == 4
    with pytest.raises(CheckpointError, match="lm_head"):
        load_lora_weights(model, GOLDEN / "vocabulary", name="other")  # its head is no layer of ours


# --- several at once


def test_each_request_of_a_batch_gets_its_own_adapter():
    llm = pymllm.LLM(
        BASE,
        device="cpu",
        dtype="float32",
        adapters={"a": GOLDEN / "attention", "v/1.0": GOLDEN / "vocabulary"},
    )
    assert set(llm.adapters) == {"a", "v/1.0"}
    ids, expected_a = golden("attention")
    _, expected_v = golden("vocabulary")
    base_logits = llm.logits(ids)
    assert relative_error(llm.logits(ids, adapter="a"), expected_a) <= TOLERANCE
    assert relative_error(llm.logits(ids, adapter="v/1.0"), expected_v) <= TOLERANCE
    assert torch.equal(llm.logits(ids), base_logits), "no adapter is active by itself"
    params = SamplingParams(max_tokens=6, logprobs=3, ignore_eos=True)
    prompts = [ids.tolist(), ids.tolist()[:5], ids.tolist(), ids.tolist()[:7]]
    names = ["a", None, "v/1.0", "a"]
    together = llm.generate(prompts, params, adapter=names)
    for prompt, name, output in zip(prompts, names, together, strict=True):
        (alone,) = llm.generate(prompt, params, adapter=name)
        assert output.token_ids == alone.token_ids
        for mine, other in zip(output.logprobs, alone.logprobs, strict=True):
            assert math.isclose(mine.logprob, other.logprob, abs_tol=1e-4)
    assert (
        len(
            {
                together[0].token_ids,
                together[2].token_ids,
                tuple(llm.generate(prompts[0], params)[0].token_ids),
            }
        )
        == 3
    )


def test_an_unknown_adapter_is_a_request_error_with_the_nearest_name():
    llm = pymllm.LLM(BASE, device="cpu", dtype="float32", adapters={"french": GOLDEN / "attention"})
    with pytest.raises(RequestError, match="Nearest: french") as caught:
        llm.generate([1, 2], adapter="frensh")
    assert caught.value.param == "adapter"
    with pytest.raises(RequestError, match="one adapter"):
        llm.generate([[1], [2]], adapter=["french"])
    with pytest.raises(RequestError, match="no adapter"):
        llm.stream([1], adapter="x")
    llm.unload_adapter("french")
    with pytest.raises(RequestError, match="none is loaded"):
        llm.logits([1], adapter="french")


def test_a_merged_adapter_is_everyones_until_it_is_unmerged():
    llm = pymllm.LLM(
        BASE, device="cpu", dtype="float32", adapters={n: GOLDEN / n for n in ("attention", "vocabulary")}
    )
    ids, expected = golden("vocabulary")
    before = llm.logits(ids)
    assert "model.embed_tokens" in llm.merge_adapter("vocabulary").unmerged
    for adapter in (None, "vocabulary"):
        assert relative_error(llm.logits(ids, adapter=adapter), expected) <= TOLERANCE
    with pytest.raises(RequestError, match="'vocabulary' is merged"):
        llm.logits(ids, adapter="attention")
    with pytest.raises(ConfigError, match="merged already"):
        llm.merge_adapter("attention")
    with pytest.raises(ConfigError, match="is merged"):
        llm.load_adapter("vocabulary", GOLDEN / "vocabulary")
    llm.unmerge_adapter()
    assert torch.equal(llm.logits(ids), before)
    assert relative_error(llm.logits(ids, adapter="attention"), golden("attention")[1]) <= TOLERANCE


def test_an_adapter_can_be_replaced_under_its_name():
    llm = pymllm.LLM(BASE, device="cpu", dtype="float32", adapters={"x": GOLDEN / "stabilised"})
    llm.load_adapter("x", GOLDEN / "attention")
    ids, expected = golden("attention")
    assert relative_error(llm.logits(ids, adapter="x"), expected) <= TOLERANCE
    assert set(llm.adapters) == {"x"}


# --- accounting


def test_an_unknown_target_fails_naming_it_and_the_nearest(tmp_path):
    folder = copied(tmp_path, "attention", target_modules=["q_prj", "v_proj"])
    model = base()
    with pytest.raises(CheckpointError) as caught:
        load_lora_weights(model, folder)
    message = str(caught.value)
    assert "q_prj: a target of the adapter that names no layer" in message and "Nearest: q_proj" in message
    assert "the adapter's target_modules leave its layer out" in message, "q_proj's matrices are not loaded"
    assert not loaded_adapters(model) and not any(getattr(m, "adapters", None) for m in model.modules())


def test_a_regular_expression_that_matches_nothing_fails_naming_it(tmp_path):
    folder = copied(tmp_path, "expression", target_modules=r"model\.block\.\d+\.q_proj")
    with pytest.raises(CheckpointError, match=r"model\\.block.*names no layer"):
        load_lora_weights(base(), folder)


def test_a_tensor_without_a_layer_is_an_error_with_the_nearest_name(tmp_path):
    def edit(tensors):
        key = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
        tensors[key.format(7)] = tensors.pop(key.format(1))

    with pytest.raises(CheckpointError) as caught:
        load_lora_weights(base(), copied(tmp_path, "attention", edit))
    message = str(caught.value)
    assert "no layer that takes adapters is called model.layers.7.self_attn.q_proj" in message
    assert "Nearest: model.layers.1.self_attn.q_proj" in message
    assert "model.layers.1.self_attn.q_proj.lora_A.weight: missing" in message


@pytest.mark.parametrize("size", (1, 2))
def test_a_copy_of_a_targeted_embedding_must_be_the_models(tmp_path, size):
    """As PEFT saves it unless told otherwise."""
    table = load_file(BASE / "model.safetensors")
    names = {f"base_model.model.{name}.base_layer.weight": name for name in ("model.embed_tokens", "lm_head")}
    copies = {saved: table[f"{name}.weight"] for saved, name in names.items()}
    ids, expected = golden("vocabulary")
    folder = copied(tmp_path, "vocabulary", lambda tensors: tensors.update(copies))
    copies["base_model.model.lm_head.base_layer.weight"] = table["lm_head.weight"] + 1e-3
    other = copied(tmp_path / "other", "vocabulary", lambda tensors: tensors.update(copies))
    copies["base_model.model.lm_head.base_layer.weight"] = torch.zeros(48, 32)
    larger = copied(tmp_path / "larger", "vocabulary", lambda tensors: tensors.update(copies))

    def work(_):
        model = base()
        with pytest.raises(CheckpointError, match=r"base weights of its own.*other weights"):
            load_lora_weights(model, other)
        with pytest.raises(CheckpointError, match=r"expected \[41, 32\], found \[48, 32\]"):
            load_lora_weights(model, larger)
        assert not loaded_adapters(model)
        load_lora_weights(model, folder)
        return logits_of(model, ids)

    for logits in simulate(size, work):
        assert relative_error(logits, expected) <= TOLERANCE
    model = base(quant="lm_head=int8")
    with pytest.raises(CheckpointError, match="cannot be compared"):
        load_lora_weights(model, folder)


@pytest.mark.parametrize("whole", ("model.embed_tokens.weight", "lm_head.base_layer.weight"))
def test_whole_weights_beside_an_adapter_are_refused(tmp_path, whole):
    folder = copied(
        tmp_path, "attention", lambda t: t.update({f"base_model.model.{whole}": torch.zeros(41, 32)})
    )
    with pytest.raises(CheckpointError, match=f"{re.escape(whole)}.*whole weights"):
        load_lora_weights(base(), folder)


def test_a_rank_that_contradicts_the_settings_is_a_wrong_shape(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected \[8, 32\], found \[4, 32\]"):
        load_lora_weights(base(), copied(tmp_path, "attention", r=8))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    def edit(tensors):
        next(iter(tensors.values()))[0, 0] = math.nan

    model = base()
    with pytest.raises(CheckpointError, match="not finite"):
        load_lora_weights(model, copied(tmp_path, "attention", edit))
    assert not loaded_adapters(model)


def test_an_adapter_of_another_model_lists_everything_that_is_wrong(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "llama")
    with pytest.raises(CheckpointError, match="8 problems, nothing was loaded"):
        load_lora_weights(load_model(checkpoint.folder, device="cpu"), GOLDEN / "attention")


def test_a_pickled_adapter_is_never_opened(tmp_path):
    folder = copied(tmp_path, "attention")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled") as caught:
        load_lora_weights(base(), folder)
    assert caught.value.code == "pickle-only"


# --- settings


@pytest.mark.parametrize(
    "setting, value",
    (
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts.down_proj"]),
        ("trainable_token_indices", [1]),
        ("init_lora_weights", "pissa"),
        ("a_setting_of_tomorrow", 3),
        ("peft_type", "LOHA"),
        ("r", 0),
        ("r", True),
        ("lora_alpha", "8"),
        ("target_modules", []),
        ("target_modules", 3),
        ("rank_pattern", {"(": 3}),
        ("target_modules", r"(\w+)(\.\w+)+\1\2_proj"),
        ("rank_pattern", {"q_proj": -1}),
    ),
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, setting, value):
    with pytest.raises(ConfigError, match=setting) as caught:
        load_lora_config(copied(tmp_path, "attention", **{setting: value}))
    assert caught.value.code == "adapter-config" and "adapter_config.json" in str(caught.value)


def test_ranks_and_scalings_follow_their_patterns():
    config = load_lora_config(GOLDEN / "stabilised")
    assert config.rank_of("model.layers.1.mlp.down_proj") == 2
    assert config.rank_of("model.layers.1.self_attn.k_proj") == 8
    assert config.rank_of("model.layers.0.self_attn.k_proj") == 4
    assert config.scaling_of("model.layers.0.mlp.down_proj") == 3 / math.sqrt(2)
    assert config.scaling_of("model.layers.1.self_attn.k_proj") == 8 / math.sqrt(8)
    assert load_lora_config(GOLDEN / "attention").scaling_of("model.layers.0.self_attn.q_proj") == 4


def test_enabled_layers_change_nothing_until_they_are_loaded():
    ids, expected = golden("attention")
    model = base()
    plain = logits_of(model, ids)
    names = enable_lora_for_model(model, load_lora_config(GOLDEN / "attention"))
    assert names == [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qv"]
    assert torch.equal(logits_of(model, ids), plain)
    layer = model.model.layers[0].self_attn.qkv_proj
    q, v = layer.adapters["default"].parts
    assert q.A.shape == (4, 32) and float(q.A.abs().max()) > 0 and not q.B.any() and q.scaling == 4
    assert q.B.shape == (32, 4) and v.B.shape == (16, 4)
    load_lora_weights(model, GOLDEN / "attention")
    assert relative_error(logits_of(model, ids), expected) <= TOLERANCE


def test_generation_with_an_adapter_follows_its_logits_token_by_token(tmp_path):
    """The shipped model, whose decoding steps run natively: they must not run without the adapter."""
    llm = pymllm.LLM(progress=False)
    adapter_for_shipped(tmp_path, llm)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = llm.encode("import os\n")
    plain = llm.generate(prompt, params)[0].token_ids
    llm.load_adapter("odd", tmp_path)
    assert llm.generate(prompt, params)[0].token_ids == plain
    answer = llm.generate(prompt, params, adapter="odd")[0].token_ids
    logits = llm.logits([*prompt, *answer], adapter="odd")
    expected = logits[len(prompt) - 1 : -1].argmax(-1)
    # The two kernels of a step and of a whole text may round apart where two tokens are all but equal.
    chosen = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert bool((logits[len(prompt) - 1 : -1].max(-1).values - chosen <= 0.05).all()), (answer, expected)
    assert answer != plain
    mixed = llm.generate([prompt, prompt], params, adapter=["odd", None])
    assert mixed[1].token_ids == plain and mixed[0].token_ids[:3] == answer[:3]
