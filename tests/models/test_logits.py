"""Logits equal transformers' own on the same (dequantised) weights, in float32."""

# T tokens, V vocabulary

from __future__ import annotations

import pytest
import torch

import pymllm
from pymllm.errors import ShardingError
from pymllm.models import list_model_types, read_model_config
from pymllm.parallel import Parallel
from tests.embedding.encoders import ENCODERS

from ..block_checkpoints import FAMILIES as BLOCK_FAMILIES
from ..checkpoints import FAMILIES, FORMATS, relative_error, tiny_config, write_checkpoint
from ..forward import TOLERANCE, assert_equal_to_transformers, llm_logits_of
from ..moe_checkpoints import FAMILIES as MOE_FAMILIES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_every_family_is_tested_here():
    encoders = {family.replace("-", "_") for family in ENCODERS}  # in tests/embedding
    # Mixtures are in tests/moe, families that are decoded by blocks in test_block_diffusion.
    assert set(list_model_types()) == {*FAMILIES, *MOE_FAMILIES, *BLOCK_FAMILIES, *encoders}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ("none", "awq-g64", "fp8-block"))
def test_logits_equal_transformers(tmp_path, family, fmt):
    assert_equal_to_transformers(write_checkpoint(tmp_path / "m", family, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_spelling_of_every_format_gives_the_same_logits(tmp_path, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt, shards=3)
    assert_equal_to_transformers(checkpoint)
    exact = llm_logits_of(checkpoint, kernels={"linear": "reference"})
    assert relative_error(exact, checkpoint.logits()) <= TOLERANCE


@pytest.mark.parametrize("fmt", ("none", "awq-g128", "fp8-block"))
@pytest.mark.parametrize("family", ("llama", "qwen3"))
def test_tied_embeddings(tmp_path, family, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", family, fmt, tie_word_embeddings=True)
    assert "lm_head.weight" not in checkpoint.tensors
    assert_equal_to_transformers(checkpoint)


@pytest.mark.parametrize("heads, kv_heads", ((4, 4), (4, 1), (8, 2)))
def test_grouped_heads(tmp_path, heads, kv_heads):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 32}
    assert_equal_to_transformers(write_checkpoint(tmp_path / "m", "llama", "awq-g32", **sizes))


def test_a_head_size_of_its_own_and_one_from_the_hidden_size(tmp_path):
    assert_equal_to_transformers(write_checkpoint(tmp_path / "own", "llama", head_dim=16))

    def without(raw):
        del raw["head_dim"]

    assert_equal_to_transformers(write_checkpoint(tmp_path / "derived", "llama", edit_config=without))


@pytest.mark.parametrize(
    "family, biases",
    (("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})),
)
@pytest.mark.parametrize("fmt", ("none", "awq-g64"))
def test_biases_where_the_config_asks_for_them(tmp_path, family, biases, fmt):
    assert_equal_to_transformers(write_checkpoint(tmp_path / "m", family, fmt, **biases))


def test_modules_that_are_not_converted_stay_in_floats(tmp_path):
    ignored = ("self_attn.v_proj", "mlp.down_proj")
    for fmt in ("awq-g64", "fp8-block", "ct-channel"):
        names = (
            ignored
            if fmt != "ct-channel"
            else tuple(f"model.layers.{i}.{name}" for i in (0, 1) for name in ignored)
        )
        checkpoint = write_checkpoint(tmp_path / fmt, "llama", fmt, ignored=names)
        assert checkpoint.tensors["model.layers.1.self_attn.v_proj.weight"].dtype is torch.float32
        assert_equal_to_transformers(checkpoint)


# --- q, k and v, and gate and up, side by side in one tensor


def test_blocks_that_lie_across_q_k_and_v(tmp_path):
    """Heads of 24: a block of 128 has rows of q and of k; one rank reads it as it is, two cannot."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "hidden_size": 144}
    checkpoint = write_checkpoint(tmp_path / "m", "phi3", "fp8-block", **sizes)
    assert_equal_to_transformers(checkpoint)
    with Parallel(1, 2), pytest.raises(ShardingError, match="qkv_proj"):
        pymllm.plan(checkpoint.folder, device="cpu")
    assert pymllm.plan(checkpoint.folder, device="cpu").tensor_parallel["legal_sizes"] == [1]


@pytest.mark.parametrize("rules", ("**.qkv_proj=int8", "**.mlp.gate_up_proj=fp8", "**=int4:group_size=32"))
def test_such_tensors_are_planned_verified_and_converted_by_their_name(tmp_path, rules):
    checkpoint = write_checkpoint(tmp_path / "m", "phi3", "awq-g32")
    planned = pymllm.plan(checkpoint.folder, device="cpu")
    row = planned.layer("model.layers.1.self_attn.qkv_proj")
    assert (row.shape, row.fused_with) == ([256, 128], [])
    llm = pymllm.LLM(checkpoint.folder, rules, device="cpu")
    assert pymllm.verify(llm).ok
    expected = checkpoint.logits()
    error = float((llm.logits(checkpoint.ids.tolist()) - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.15  # int4 rounds most


# --- sliding windows


def test_mistrals_window_shorter_than_the_prompt(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "m", "mistral", sliding_window=7)
    assert_equal_to_transformers(checkpoint)
    wide = write_checkpoint(tmp_path / "wide", "mistral", sliding_window=None)
    assert relative_error(llm_logits_of(wide), checkpoint.logits()) > 0.01, "the window must matter"
    assert_equal_to_transformers(wide)


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
@pytest.mark.parametrize("spelling", ("layer_types", "max_window_layers"))
def test_qwens_window_on_the_later_layers_only(tmp_path, family, spelling):
    def without_the_other(raw):
        del raw["max_window_layers" if spelling == "layer_types" else "layer_types"]

    settings = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    checkpoint = write_checkpoint(tmp_path / "m", family, edit_config=without_the_other, **settings)
    assert list(checkpoint.model.config.layer_types) == ["full_attention", "sliding_attention"]
    assert_equal_to_transformers(checkpoint)


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_qwens_window_is_off_unless_asked_for(tmp_path, family):
    def claim_a_window(raw):
        raw["sliding_window"] = 7

    checkpoint = write_checkpoint(
        tmp_path / "m", family, edit_config=claim_a_window, use_sliding_window=False
    )
    assert_equal_to_transformers(checkpoint)


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 40 for i in range(16)],
    "long_factor": [1.0 + i / 3 for i in range(16)],
}


def as_phi3_files_are(name):
    def edit(raw):
        raw["rope_scaling"] = {"type": name, **{key: LONG[key] for key in ("short_factor", "long_factor")}}
        raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]

    return edit


@pytest.mark.parametrize("spelling", ("5", "longrope", "su"))
@pytest.mark.parametrize("trained", (16, 64))
def test_phi3s_long_rotary_positions(tmp_path, spelling, trained):
    """A prompt of 24 tokens, below and above the trained length."""
    checkpoint = write_checkpoint(
        tmp_path / "m",
        "phi3",
        edit_config=None if spelling == "5" else as_phi3_files_are(spelling),
        rope_parameters={"rope_theta": 5000.0, **LONG},
        original_max_position_embeddings=trained,
    )
    assert_equal_to_transformers(checkpoint)


# --- rotary settings, as transformers 5 and 4 spell them

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-no-truncate": YARN | {"truncate": False},
}


def as_transformers_4_wrote(raw):
    settings = raw.pop("rope_parameters")
    raw["rope_theta"] = settings.pop("rope_theta")
    raw["rope_scaling"] = None if settings["rope_type"] == "default" else settings


def as_early_transformers_4_wrote(raw):
    as_transformers_4_wrote(raw)
    if raw["rope_scaling"]:
        raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")


SPELLINGS = {"5": None, "4": as_transformers_4_wrote, "early-4": as_early_transformers_4_wrote}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rotary_settings_in_every_spelling(tmp_path, rope, spelling):
    # A trained length below the prompt's, so that dynamic scaling sets in.
    checkpoint = write_checkpoint(
        tmp_path / "m",
        "llama",
        edit_config=SPELLINGS[spelling],
        rope_parameters={"rope_theta": 5000.0, **ROPES[rope]},
        max_position_embeddings=16 if rope == "dynamic" else 128,
        num_hidden_layers=1,
    )
    assert_equal_to_transformers(checkpoint)


def test_rotary_settings_are_not_the_same_thing(tmp_path):
    """Otherwise the tests above could not fail."""
    logits = [
        write_checkpoint(
            tmp_path / rope, "llama", num_hidden_layers=1, rope_parameters={"rope_theta": 5e3, **settings}
        )
        .logits()
        .flatten()
        for rope, settings in ROPES.items()
        if rope != "dynamic"
    ]
    for index, one in enumerate(logits):
        assert all(relative_error(one, other) > 1e-3 for other in logits[:index])


# --- other dtypes


@pytest.mark.parametrize("fmt", ("none-bf16", "awq-g64", "fp8-block"))
def test_bfloat16_is_near(tmp_path, fmt):
    checkpoint = write_checkpoint(tmp_path / "m", "llama", fmt)
    # Two layers of eight roundings of 2^-9 each, which partly cancel: some 2% measured.
    assert relative_error(llm_logits_of(checkpoint, dtype="bfloat16"), checkpoint.logits()) <= 0.05


def test_the_checkpoints_own_dtype_is_the_default_unless_it_is_quantised(tmp_path):
    plain = pymllm.LLM(write_checkpoint(tmp_path / "plain", "llama", "none-bf16").folder, device="cpu")
    assert plain.prepared.execution.dtype is torch.bfloat16
    quantised = pymllm.LLM(write_checkpoint(tmp_path / "awq", "llama", "awq-g64").folder, device="cpu")
    assert quantised.prepared.execution.dtype is torch.float32


# --- what config.json leaves out

SIZES_ALONE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def settings_that_matter(config):
    layers = range(config.num_hidden_layers)
    return {
        "head_dim": config.head_dim,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.get("hidden_activation") or config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.get("attention_bias") or False,
        "mlp_bias": config.get("mlp_bias") or False,
        "tied": config.tie_word_embeddings,
        "ropes": [
            (config.rope_parameters_of(layer).theta, config.rope_parameters.rope_type) for layer in layers
        ],
        "scale": config.get("query_pre_attn_scalar"),
        "caps": (config.get("attn_logit_softcapping"), config.get("final_logit_softcapping")),
        "windows": [config.sliding_window_of(layer) for layer in layers],
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "given",
    ({}, {"num_attention_heads": 64}, {"use_sliding_window": True}),
    ids=("sizes", "heads", "sliding"),
)
def test_a_setting_that_config_json_lacks_is_transformers_default(family, given):
    if "use_sliding_window" in given and "qwen" not in family:
        pytest.skip("only Qwen has this switch")
    filled_in = type(tiny_config(family))(**given).to_dict()
    sparse = {"model_type": family} | {key: filled_in[key] for key in (*SIZES_ALONE, *given)}
    assert settings_that_matter(read_model_config(sparse)) == settings_that_matter(
        read_model_config(filled_in)
    )
