"""GGUF files of every architecture: logits, settings and tensors are those of transformers' model."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pymllm
from pymllm.errors import PymllmError
from pymllm.models import gguf_architectures, list_model_types
from pymllm.parallel import simulate
from pymllm.weights.gguf_architecture import Interleaved, Raised
from pymllm.weights.opening import open_checkpoint

from ..checkpoints import relative_error
from ..forward import TOLERANCE
from ..forward import logits_of as our_logits
from ..gguf_files import encode
from ..gguf_models import ARCHITECTURES, logits_of, write_model

IDS = torch.randint(0, 97, (24,), generator=torch.Generator().manual_seed(3))
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1 + i / 40 for i in range(16)],
    "long_factor": [1 + i / 3 for i in range(16)],
}
GEMMA3 = {"query_pre_attn_scalar": 32, "num_hidden_layers": 7, "sliding_window_pattern": 6}
YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "mixtral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen2_moe": {},
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 32, "num_hidden_layers": 3},
    "gemma3_text": GEMMA3 | {"final_logit_softcapping": 3.0},
    "gemma3_text-linear": GEMMA3
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 12000.0},
        }
    },
    "phi3": {"original_max_position_embeddings": 128},
    "phi3-window": {"original_max_position_embeddings": 128, "sliding_window": 7},
    "phi3-partial": {
        "original_max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.75},
    },
    "phi3-long": {"rope_parameters": LONG, "original_max_position_embeddings": 16},
    "phi3-short": {"rope_parameters": LONG, "original_max_position_embeddings": 64},
    "olmo2": {},
    "granite": {},
    "granite-tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "granitemoe": {},
    "glm4": {},
    "glm4-plain": {
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.25},
    },
    "gpt_oss": {},
    "gpt_oss-plain-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}


def ours(path, **options):
    return pymllm.LLM(path, device="cpu", dtype="float32", **options).logits(IDS.tolist())


def config_of(path):
    return open_checkpoint(path, gguf_architectures()).config


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    model = write_model(tmp_path / "m.gguf", case.partition("-")[0], **CASES[case])
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE


def test_every_model_with_gguf_files_is_tested_here():
    assert set(ARCHITECTURES.values()) == set(gguf_architectures())
    assert {case.partition("-")[0] for case in CASES} == set(ARCHITECTURES) <= set(list_model_types())


# Settings that transformers' reader does not take from a file have its defaults here.
THEIRS = {
    "qwen2_moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3_moe": {"moe_intermediate_size": 768, "mlp_only_layers": [], "norm_topk_prob": True},
    "phi3": {"original_max_position_embeddings": 128},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
}


@pytest.mark.parametrize("family", THEIRS)
def test_logits_are_those_of_transformers_own_reading_of_the_file(family, tmp_path):
    def edit(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{index}" for index in range(97)])
        writer.add_pad_token_id(0)

    write_model(tmp_path / "m.gguf", family, edit=edit, **THEIRS[family])
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE


@pytest.mark.parametrize("family", ("gemma3_text", "gpt_oss", "granitemoe", "glm4", "phi3", "qwen2_moe"))
def test_ranks_together_answer_as_one(family, tmp_path):
    model = write_model(tmp_path / "m.gguf", family, **CASES[family])

    def run(parallel):
        return our_logits(pymllm.load_model(tmp_path / "m.gguf", device="cpu", dtype="float32"), IDS)

    for logits in simulate(2, run):
        assert relative_error(logits, logits_of(model, IDS)) <= TOLERANCE


# --- names and changes, in both directions


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_and_changes_lead_back_to_the_file(family, tmp_path):
    """As a writer uses them: from each of the model's tensors to the file's, and every tensor of the file is met."""
    model = write_model(tmp_path / "m.gguf", family, **CASES[family])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    checkpoint = open_checkpoint(tmp_path / "m.gguf", gguf_architectures())
    known = gguf_architectures()[ARCHITECTURES[family]]
    if family == "mixtral":
        known = known.with_experts
    met = set()
    for name, info in checkpoint.tensors.items():
        if name.startswith("rope_"):
            continue
        file_name, expert = known.file_name(name)
        met.add(file_name)
        values = info.read()
        change = known.change_of(name, model.config.head_dim)
        back = values if change is None else change.stored(values)
        whole = stored[file_name].data
        expected = whole if expert is None else whole[expert]
        np.testing.assert_allclose(back.numpy().reshape(expected.shape), expected, atol=1e-7)
    assert met == {name for name in stored if not name.startswith("rope_")}


@pytest.mark.parametrize("change", (Interleaved(8), Raised(1.0)))
def test_a_change_is_undone(change):
    values = torch.arange(48.0).unflatten(0, (16, 3))
    assert not torch.equal(change.stored(values), values)
    assert torch.equal(change.restored(change.stored(values)), values)


def fused(tensors):
    """As the converter's options --fuse-gate-up-exps and --fuse-qkv write them."""
    for layer in range(2):
        parts = [tensors.pop(f"blk.{layer}.ffn_{name}_exps.weight") for name in ("gate", "up")]
        tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"blk.{layer}.attn_{name}.{kind}") for name in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{kind}"] = np.concatenate(parts)


def test_parts_that_share_a_tensor_are_read_as_their_own(tmp_path):
    model = write_model(tmp_path / "m.gguf", "qwen2_moe", edit_tensors=fused)
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE


def scaled_blocks(tensors, fuse):
    """Replace the experts of layer 0 by NVFP4 blocks of golden vectors, with a factor for each expert.

    fuse: whether gate and up are one tensor.  Returns the experts' meant values, [E, O, I], by their tensor's name.
    """
    factors = np.random.default_rng(5).uniform(0.5, 3, 16).astype(np.float32)
    meant = {}
    for index, name in enumerate(("gate", "up", "down")):
        experts, rows, columns = tensors[f"blk.0.ffn_{name}_exps.weight"].shape
        raw, values = encode(np.zeros((experts * rows, columns), np.float32), "NVFP4", index)
        offset = 0 if fuse and name == "up" else index  # gate and up of one tensor have one factor
        mine = factors[offset : offset + experts]
        tensors[f"blk.0.ffn_{name}_exps.weight"] = raw.reshape(experts, rows, -1)
        tensors[f"blk.0.ffn_{name}_exps.scale"] = mine
        tensors[f"blk.0.ffn_{name}_exps.input_scale"] = np.ones(experts, np.float32)
        meant[name] = values.reshape(experts, rows, columns) * mine[:, None, None]
    if fuse:
        parts = [tensors.pop(f"blk.0.ffn_{name}_exps.weight") for name in ("gate", "up")]
        tensors["blk.0.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
        for suffix in ("scale", "input_scale"):
            del tensors[f"blk.0.ffn_gate_exps.{suffix}"]
            tensors[f"blk.0.ffn_gate_up_exps.{suffix}"] = tensors.pop(f"blk.0.ffn_up_exps.{suffix}")
    return meant


@pytest.mark.parametrize("fuse", (False, True))
def test_each_expert_of_a_tensor_has_its_own_factor(fuse, tmp_path):
    """As llama.cpp's converter writes NVFP4: a float32 number for each expert, beside the blocks of all."""
    meant = {}
    sizes = {"mlp_only_layers": [], "hidden_size": 64, "moe_intermediate_size": 64}
    model = write_model(
        tmp_path / "m.gguf", "qwen3_moe", edit_tensors=lambda t: meant.update(scaled_blocks(t, fuse)), **sizes
    )
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        gate_up = np.concatenate((meant["gate"], meant["up"]), axis=1)
        experts.gate_up_proj.copy_(torch.from_numpy(gate_up))
        experts.down_proj.copy_(torch.from_numpy(meant["down"]))
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE
    assert pymllm.verify(tmp_path / "m.gguf", device="cpu").ok
    # Written again, the blocks and their factors are the same.
    pymllm.quantize_checkpoint(tmp_path / "m.gguf", tmp_path / "out.gguf", {"**.self_attn.**": "none"})
    assert torch.equal(ours(tmp_path / "out.gguf"), ours(tmp_path / "m.gguf"))
    factors = next(
        t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors if t.name.endswith("up_exps.scale")
    )
    assert len(factors.data) == len(set(factors.data)) == experts.num_experts


def test_a_factor_that_is_not_one_number_an_expert_is_refused(tmp_path):
    def spoil(tensors):
        scaled_blocks(tensors, False)
        tensors["blk.0.ffn_down_exps.scale"] = tensors["blk.0.ffn_down_exps.scale"][:-1]

    sizes = {"mlp_only_layers": [], "hidden_size": 64, "moe_intermediate_size": 64}
    write_model(tmp_path / "m.gguf", "qwen3_moe", edit_tensors=spoil, **sizes)
    with pytest.raises(PymllmError) as caught:
        pymllm.plan(tmp_path / "m.gguf", device="cpu")
    assert caught.value.code == "shape" and caught.value.tensor == "blk.0.ffn_down_exps.scale"


def test_early_files_leave_the_sizes_of_experts_to_their_tensors(tmp_path):
    model = write_model(
        tmp_path / "m.gguf",
        "qwen2_moe",
        without=("expert_feed_forward_length", "expert_shared_feed_forward_length"),
    )
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE


# --- settings


@pytest.mark.parametrize(("family", "layers"), (("gemma2", 46), ("gemma3_text", 62)))
def test_one_size_of_gemma_scales_attention_by_hidden_size_over_heads(family, layers, tmp_path):
    """No file has the scale: 27 billion parameters are told by the number of layers, as llama.cpp does."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "sliding_window_pattern": 6}
    write_model(tmp_path / "m.gguf", family, num_hidden_layers=layers, **sizes)
    assert config_of(tmp_path / "m.gguf")["query_pre_attn_scalar"] == 12
    write_model(tmp_path / "m.gguf", family, num_hidden_layers=1, **sizes)
    assert config_of(tmp_path / "m.gguf")["query_pre_attn_scalar"] == 32


def test_what_a_file_leaves_out_is_what_llama_cpp_takes_it_for(tmp_path):
    """Not the default of a config.json of that family."""
    write_model(tmp_path / "a.gguf", "gpt_oss", without=("freq_base", "head_count_kv"), num_key_value_heads=4)
    config = config_of(tmp_path / "a.gguf")
    assert config["num_key_value_heads"] == 4 and config["rope_parameters"]["rope_theta"] == 10000.0
    write_model(
        tmp_path / "b.gguf", "granite", without=("attention.scale", "residual_scale", "embedding_scale")
    )
    config = config_of(tmp_path / "b.gguf")
    assert config["attention_multiplier"] == 32**-0.5
    assert config["residual_multiplier"] == config["embedding_multiplier"] == 1
    write_model(tmp_path / "c.gguf", "gemma3_text", without=("sliding_window", "freq_base_swa"), **GEMMA3)
    assert config_of(tmp_path / "c.gguf")["layer_types"] == ["full_attention"] * 7
    write_model(tmp_path / "d.gguf", "glm4", without=("rope.dimension_count",))
    assert config_of(tmp_path / "d.gguf")["rope_parameters"]["partial_rotary_factor"] == 1
    write_model(tmp_path / "e.gguf", "gemma2", without=("sliding_window", "softcapping"))
    config = config_of(tmp_path / "e.gguf")
    assert (config["sliding_window"], config["attn_logit_softcapping"]) == (4096, 50.0)


@pytest.mark.parametrize("pattern", ([True, False, True], [False, False, True], 3, 0))
def test_a_file_says_which_layers_have_a_window(pattern, tmp_path):
    """A list has a value for each layer; a number N: of so many layers in a row the last one has none (0: each has)."""

    def edit(writer):
        if isinstance(pattern, int):
            writer.add_uint32("gemma2.attention.sliding_window_pattern", pattern)
        else:
            writer.add_sliding_window_pattern(pattern)

    slides = pattern if isinstance(pattern, list) else [pattern == 0 or layer % 3 < 2 for layer in range(3)]
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    settings = {"query_pre_attn_scalar": 32, "num_hidden_layers": 3, "layer_types": kinds}
    model = write_model(tmp_path / "m.gguf", "gemma2", edit=edit, **settings)
    assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE


@pytest.mark.parametrize(("rotated", "head_dim"), ((58, 100), (14, 26), (2, 98), (96, 128)))
def test_the_rotated_part_of_a_head_is_the_files_number(rotated, head_dim, tmp_path):
    def edit(writer):
        writer.add_rope_dimension_count(rotated)

    write_model(tmp_path / "m.gguf", "qwen2", edit=edit, head_dim=head_dim)
    factor = config_of(tmp_path / "m.gguf")["rope_parameters"]["partial_rotary_factor"]
    assert int(head_dim * factor) == rotated


def add(key, value):
    kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
    return lambda writer: getattr(writer, f"add_{kind}")(key, value)


@pytest.mark.parametrize(
    ("family", "key", "value", "code"),
    (
        ("granite", "granite.rope.scaling.finetuned", False, "config-value"),  # no rotary positions
        ("granite", "granite.attention.sliding_window", 7, "config-key"),
        ("granitemoe", "granitemoe.expert_shared_feed_forward_length", 64, "config-key"),
        ("glm4", "glm4.nextn_predict_layers", 1, "config-key"),
        ("gemma2", "gemma2.attention.scale", 0.5, "config-key"),
        ("gemma3_text", "gemma3.attn_logit_softcapping", 5.0, "config-key"),
        ("qwen2_moe", "qwen2moe.expert_weights_norm", True, "config-value"),
        ("qwen3_moe", "qwen3moe.expert_weights_norm", False, "config-value"),
        ("qwen3_moe", "qwen3moe.expert_gating_func", 2, "config-value"),
        ("mixtral", "llama.expert_weights_scale", 2.5, "config-value"),
        ("mixtral", "llama.expert_group_count", 2, "config-value"),
        ("gpt_oss", "gpt-oss.expert_gating_func", 1, "config-value"),
        ("llama", "llama.rope.scaling.attn_factor", 1.5, "config-value"),
        ("llama", "llama.rope.scaling.alpha", 1.5, "config-key"),
        ("llama", "llama.rope.freq_base_swa", 5000.0, "config-key"),
        ("qwen3", "qwen3.attention.key_length_swa", 16, "config-key"),
        ("phi3", "phi3.rope.scaling.type", "yarn", "config-value"),
    ),
)
def test_a_setting_that_would_change_the_model_is_refused(family, key, value, code, tmp_path):
    settings = CASES["phi3-long" if family == "phi3" else family]
    write_model(tmp_path / "m.gguf", family, edit=add(key, value), **settings)
    with pytest.raises(PymllmError) as caught:
        config_of(tmp_path / "m.gguf")
    assert caught.value.code == code and caught.value.tensor == key


@pytest.mark.parametrize(
    ("family", "key"),
    (
        ("llama", "attention.layer_norm_rms_epsilon"),
        ("qwen2", "block_count"),
        ("phi3", "context_length"),
        ("gemma", "embedding_length"),
        ("olmo2", "attention.head_count"),
        ("granite", "logit_scale"),
        ("gpt_oss", "attention.sliding_window"),
    ),
)
def test_a_setting_that_a_model_needs_is_asked_for(family, key, tmp_path):
    write_model(tmp_path / "m.gguf", family, without=(f".{key}",), **CASES[family])
    with pytest.raises(PymllmError) as caught:
        config_of(tmp_path / "m.gguf")
    assert caught.value.code == "config-missing-setting" and caught.value.tensor.endswith(key)


@pytest.mark.parametrize("key", ("rope.scaling.attn_factor", "rope.scaling.original_context_length"))
def test_longrope_without_its_settings_is_refused(key, tmp_path):
    write_model(tmp_path / "m.gguf", "phi3", without=(key,), **CASES["phi3-long"])
    with pytest.raises(PymllmError) as caught:
        config_of(tmp_path / "m.gguf")
    assert caught.value.code == "config-value" and caught.value.tensor.endswith(key)


def one_expert_short(tensors):
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][:-1]


def other_experts_length(tensors):
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][:, :-32]


def a_factor_short(tensors):
    tensors["rope_factors_long.weight"] = tensors["rope_factors_long.weight"][:-1]


def without_factors(tensors):
    del tensors["rope_factors_short.weight"]


def without_sinks(tensors):
    del tensors["blk.0.attn_sinks.weight"]


@pytest.mark.parametrize(
    ("case", "spoil", "code", "said"),
    (
        ("qwen3_moe", one_expert_short, "shape", "blk.1.ffn_up_exps.weight"),
        ("qwen3_moe", other_experts_length, "shape", "model.layers.1.mlp.experts.0.up_proj"),
        ("phi3-long", a_factor_short, "shape", "rope_factors_long.weight"),
        ("phi3-long", without_factors, "shape", "rope_factors_short.weight"),
        ("gpt_oss", without_sinks, "missing", "model.layers.0.self_attn.sinks"),
    ),
)
def test_a_tensor_that_does_not_fit_is_named(case, spoil, code, said, tmp_path):
    write_model(tmp_path / "m.gguf", case.partition("-")[0], edit_tensors=spoil, **CASES[case])
    with pytest.raises(PymllmError) as caught:
        pymllm.plan(tmp_path / "m.gguf", device="cpu")
    assert caught.value.code == code and said in str(caught.value)


def test_a_dense_file_that_counts_experts_is_refused(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", edit=add("llama.expert_count", 8))
    with pytest.raises(PymllmError) as caught:
        config_of(tmp_path / "m.gguf")
    assert caught.value.code == "config-key" and caught.value.tensor == "llama.expert_count"


def test_yarns_factor_on_cosines_is_read_where_it_is_the_usual_one(tmp_path):
    for value, fits in ((1 + 0.1 * np.log(4.0), True), (1.5, False)):

        def edit(writer, value=value):
            writer.add_rope_scaling_yarn_attn_factor(float(value))

        model = write_model(tmp_path / "m.gguf", "qwen2", edit=edit, rope_parameters=YARN)
        if fits:
            assert relative_error(ours(tmp_path / "m.gguf"), logits_of(model, IDS)) <= TOLERANCE
            continue
        with pytest.raises(PymllmError) as caught:
            config_of(tmp_path / "m.gguf")
        assert caught.value.tensor == "qwen2.rope.scaling.yarn_attn_factor"


def test_gpt_oss_does_not_round_yarns_bounds(tmp_path):
    """llama.cpp rounds them for every model; openai's own config, which no file spells, says not to."""
    write_model(tmp_path / "m.gguf", "gpt_oss")
    assert config_of(tmp_path / "m.gguf")["rope_parameters"]["truncate"] is False


def test_architectures_are_data():
    for name, known in gguf_architectures().items():
        assert dataclasses.is_dataclass(known) and known.model_type in list_model_types(), name
