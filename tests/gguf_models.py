"""Tiny GGUF files of every architecture, as llama.cpp's converter writes them from transformers' models, in float32.

Names come from the `gguf` package (llama.cpp's own), and so do the writers of settings; what the converter changes in
tensors, and which settings it writes for an architecture, is spelled out here. Each rule was compared with the
converter's own files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from .checkpoints import FAMILIES as DENSE
from .checkpoints import random_model, tiny_config
from .gguf_files import finish, interleave
from .moe_checkpoints import moe_config, random_moe

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "glm4": "glm4",
    "gpt_oss": "gpt-oss",
}
INTERLEAVED = ("llama", "granite", "granitemoe")
Edit = Callable[[gguf.GGUFWriter], None]


def write_model(
    path: Path,
    family: str,
    *,
    edit: Edit | None = None,
    edit_tensors: Callable[[dict[str, np.ndarray]], None] | None = None,
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """Write a random model of `family`; returns transformers' model.

    without: endings of keys that are left out.  edit, edit_tensors: change the rest.
    """
    dense = family in DENSE
    config = tiny_config(family, **settings) if dense else moe_config(family, **settings)
    model = random_model(config) if dense else random_moe(config)
    arch = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, arch)
    write_settings(writer, arch, config)
    if edit is not None:
        edit(writer)
    for key in [key for key in writer.kv_data[0] if key.endswith(without or ("\0",))]:
        del writer.kv_data[0][key]
    tensors = dict(stored_tensors(model, arch))
    if edit_tensors is not None:
        edit_tensors(tensors)
    for name, values in tensors.items():
        if values.dtype == np.uint8:  # blocks of NVFP4
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.NVFP4)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    finish(writer)
    return model


def write_settings(writer: gguf.GGUFWriter, arch: str, config: Any) -> None:
    """Write what the converter does for this architecture."""
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch not in ("phi3", "granite", "granitemoe"):  # they have no head size of their own
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(full["rope_theta"])
    if arch in ("llama", "granite", "granitemoe"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.hidden_size // heads)
    write_rope(writer, arch, config, full)
    if arch in ("gemma2", "gemma3", "gpt-oss") or (
        arch == "llama" and getattr(config, "sliding_window", None)
    ):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if arch in ("gemma2", "gemma3") and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if arch.startswith("granite"):
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if arch == "gpt-oss":
        writer.add_expert_feed_forward_length(config.intermediate_size)


def write_rope(writer: gguf.GGUFWriter, arch: str, config: Any, full: dict[str, Any]) -> None:
    """Write the rotary settings.  full: those of layers without a window."""
    if arch == "phi3":
        trained = config.original_max_position_embeddings
        factor = config.max_position_embeddings / trained
        writer.add_rope_scaling_orig_ctx_len(trained)
        part = full.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(part * config.hidden_size) // config.num_attention_heads)
        writer.add_sliding_window(config.sliding_window or 0)
        if "long_factor" in full:
            growth = np.sqrt(1 + np.log(factor) / np.log(trained)) if factor > 1 else 1.0
            writer.add_rope_scaling_attn_factors(float(growth))
        return
    if arch == "glm4":
        writer.add_rope_dimension_count(int(config.head_dim * full["partial_rotary_factor"]))
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        if full.get("beta_fast"):
            writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])


def stored_tensors(model: Any, arch: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a file."""
    config = model.config
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)

    def name_of(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found

    for name, weight in model.state_dict().items():
        values = weight.numpy().copy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values += 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if arch in INTERLEAVED and name.split(".")[-2] in heads:
            values = interleave(values, heads[name.split(".")[-2]])
        if name.endswith("sinks"):
            name += ".weight"
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        prefix, experts, product = name.partition(".experts.")
        if not experts:
            router = {"granitemoe": "router.weight"}.get(arch, "\0")
            short = name.replace(router, "router.layer.weight")
            mixtral = arch == "llama" and name.endswith("mlp.gate.weight")
            yield (
                name_of(short.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else short),
                values,
            )
            continue
        # All experts of a layer: [E, 2·I, H] and [E, H, I]; in gpt-oss gate and up in turns, and inputs before outputs.
        suffix = "bias" if product.endswith("bias") else "weight"
        layer = prefix.split(".")[2]
        if arch == "gpt-oss":
            values = values if suffix == "bias" else values.swapaxes(1, 2)
            gate, up = values[:, 0::2], values[:, 1::2]
        else:
            gate, up = np.split(values, 2, axis=1) if product.startswith("gate_up") else (None, None)
        if product.startswith("gate_up"):
            yield f"blk.{layer}.ffn_gate_exps.{suffix}", gate
            yield f"blk.{layer}.ffn_up_exps.{suffix}", up
        else:
            yield f"blk.{layer}.ffn_down_exps.{suffix}", values
    for key in ("long", "short") if "long_factor" in config.rope_parameters else ():
        factors = config.rope_parameters[f"{key}_factor"]
        yield f"rope_factors_{key}.weight", np.array(factors, np.float32)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute transformers' logits [T, V].  ids: [T]."""
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[0]
