"""Models with experts: logits equal transformers' own on the same (dequantised) weights, in float32."""

# T tokens, V vocabulary

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pymllm
from pymllm.models import read_model_config
from pymllm.moe import (
    get_moe_intermediate_size,
    get_num_experts,
    is_moe_layer,
)

from ..checkpoints import relative_error, save_tensors
from ..forward import assert_equal_to_transformers
from ..moe_checkpoints import FAMILIES, moe_config, write_moe

FORMATS = ("none", "none-bf16", "awq-g32", "fp8-block", "mxfp4", "ct-channel")


# gpt-oss has its experts in floats or MXFP4.
CASES = [
    (f, fmt) for f in FAMILIES for fmt in FORMATS if f != "gpt_oss" or fmt in ("none", "none-bf16", "mxfp4")
]


@pytest.mark.parametrize("family, fmt", CASES)
def test_logits_equal_transformers(tmp_path, family, fmt):
    assert_equal_to_transformers(write_moe(tmp_path / "m", family, fmt, shards=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_is_read(tmp_path, family):
    """Its own writer decides on names and layouts."""
    checkpoint = write_moe(tmp_path / "ours", family)
    folder = tmp_path / "theirs"
    checkpoint.model.save_pretrained(folder)
    assert_equal_to_transformers(replace(checkpoint, folder=folder))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
SETTINGS = {
    "mixtral": {"window": {"sliding_window": 5}},
    "qwen2_moe": {
        "renormalised": {"norm_topk_prob": True},
        "no-bias": {"qkv_bias": False},
        "every-other-layer": {"decoder_sparse_step": 2},
        "windows": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    },
    "qwen3_moe": {
        "not-renormalised": {"norm_topk_prob": False},
        "tied": {"tie_word_embeddings": True},
        "no-experts": {"num_experts": 0, "mlp_only_layers": []},
    },
    "olmoe": {
        "clipped": {"clip_qkv": 0.5, "norm_topk_prob": True},
        "biased": {"attention_bias": True},
        "one-expert-a-token": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    },
    "deepseek_v2": {
        "greedy": {"topk_method": "greedy", "routed_scaling_factor": 3.0},
        "biases-of-mlps": {"mlp_bias": True},
        "low-rank-queries": {"q_lora_rank": 48, "attention_bias": True},
        "yarn": {"rope_parameters": YARN},
    },
    "deepseek_v3": {
        "one-expert-a-token": {"num_experts_per_tok": 1},
        "not-renormalised": {"norm_topk_prob": False},
        "halves": {"rope_interleave": False},
        "yarn": {"rope_parameters": YARN},
        "all-dense-but-one": {"first_k_dense_replace": 0, "num_hidden_layers": 1},
    },
    "gpt_oss": {
        "one-expert-a-token": {"num_experts_per_tok": 1},
        "limits": {"swiglu_limit": 0.5, "swiglu_alpha": 1.3},
        "other-windows": {"layer_types": ["full_attention", "sliding_attention"]},
    },
}


@pytest.mark.parametrize("family, name", [(family, name) for family in SETTINGS for name in SETTINGS[family]])
def test_settings_of_a_family(tmp_path, family, name):
    checkpoint = write_moe(tmp_path / "m", family, **SETTINGS[family][name])
    assert_equal_to_transformers(checkpoint)
    plain = write_moe(tmp_path / "plain", family)
    if plain.model.config.num_hidden_layers == checkpoint.model.config.num_hidden_layers:
        assert relative_error(checkpoint.logits(), plain.logits()) > 1e-3, "the setting must matter"


def test_layers_that_predict_further_tokens_are_skipped_with_their_reason(tmp_path):
    checkpoint = write_moe(tmp_path / "m", "deepseek_v3")
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(2, 2),
        "model.layers.2.mlp.gate.weight": torch.zeros(2),
    }
    save_tensors(checkpoint.folder, checkpoint.tensors | extra)
    llm = pymllm.LLM(checkpoint.folder, device="cpu", dtype="float32")
    skipped = {r.name: r.reason for r in llm.load_report.tensors if r.status == "skipped"}
    assert skipped == dict.fromkeys(extra, "a layer that predicts further tokens, which is not run")


def settings_that_matter(config):
    layers = range(config.num_hidden_layers)
    names = ("rms_norm_eps", "max_position_embeddings", "hidden_act")
    own = (
        "shared_expert_intermediate_size",
        "qkv_bias",
        "clip_qkv",
        "kv_lora_rank",
        "q_lora_rank",
        "v_head_dim",
    )
    own += (
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "topk_method",
        "routed_scaling_factor",
        "n_shared_experts",
    )
    own += ("swiglu_limit", "swiglu_alpha", "rope_interleave")
    if not config.model_type.startswith("deepseek"):  # which have no use for these
        names += (
            ("head_dim", "num_experts_per_tok", "norm_topk_prob")
            if config.get("norm_topk_prob") is not None
            else ()
        )
    return {
        "experts": get_num_experts(config),
        "intermediate": get_moe_intermediate_size(config),
        "sparse": [is_moe_layer(config, layer) for layer in layers],
        "key heads": config.num_key_value_heads,
        "tied": config.tie_word_embeddings,
        "attention bias": config.get("attention_bias") or False,
        "rope": (config.rope_parameters.theta, config.rope_parameters.rope_type),
        **{name: getattr(config, name) for name in names},
        **{name: config.get(name) for name in own},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_setting_that_config_json_lacks_is_transformers_default(family):
    given = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    filled_in = type(moe_config(family))().to_dict()
    sparse = {"model_type": family} | {key: filled_in[key] for key in given if key in filled_in}
    expected, found = (settings_that_matter(read_model_config(raw)) for raw in (filled_in, sparse))
    assert found == expected
