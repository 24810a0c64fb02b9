"""Tiny random checkpoints of types without a page, written by transformers, and what transformers answers for them."""

# V vocabulary, T tokens

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

TEXT: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 128},
    **{"tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
QWEN_VISION: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14},
    "out_hidden_size": 32,
}
DELTA: dict[str, Any] = {
    **{
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "layer_types": ["linear_attention", "full_attention"],
}
# Settings by model type.
TYPES: dict[str, dict[str, Any]] = {
    "smollm3": TEXT,
    "glm4_moe": {
        **TEXT,
        **{
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
        },
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    },
    "granitemoehybrid": {
        **TEXT,
        **{
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 48,
            "mamba_expand": 2,
        },
        **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
        "mamba_n_groups": 1,
    },
    "nemotron_h": {
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"},
        **{"layer_types": ["mamba", "moe", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16},
        **{
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 12,
            "num_experts_per_tok": 2,
            "chunk_size": 16,
        },
        **{
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 4, "tie_word_embeddings": True},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "head_dim": 8, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "qwen3_5": {"text_config": {**TEXT, **DELTA}, "vision_config": QWEN_VISION},
    "cohere2_vision": {
        "text_config": {**TEXT, "sliding_window": 4, "model_type": "cohere2"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "gemma4": {
        "text_config": {
            **TEXT,
            **{
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 4,
                "global_head_dim": 8,
            },
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0},
        },
        "audio_config": None,
    },
}
IDS = [1, 5, 9, 17, 3, 22, 8, 40, 77, 12]


def make(model_type: str) -> Any:
    """Make a model with random weights, its vectors too.  Returns transformers' model in float32."""
    from transformers.models.auto import modeling_auto

    config = transformers.CONFIG_MAPPING[model_type].from_dict(TYPES[model_type])
    wraps = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    if model_type in wraps:
        name = wraps[model_type]
    else:
        name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.numel() > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with contextlib.suppress(ValueError):
        model.set_attn_implementation("eager")
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    """Return what transformers answers to IDS, [T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
