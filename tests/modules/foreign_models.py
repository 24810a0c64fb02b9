"""Tiny models of transformers with fused experts, scaled embeddings and what else a linear layer is not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pymllm.modules.experts import QuantizedExperts
from pymllm.modules.layers import QuantizedEmbedding, QuantizedLinear, QuantizedStack

from ..checkpoints import random_model

IDS = torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(7))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GDN = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(
        **SIZES, head_dim=16, rotary_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SIZES,
        **MAMBA,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        layer_types=["mamba", "attention"],
    ),
    "llama4_text": lambda: transformers.Llama4TextConfig(
        **SIZES,
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZES, **GDN),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**SIZES, **GDN),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "gemma3n_text": lambda: transformers.Gemma3nTextConfig(
        **SIZES,
        head_dim=16,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    ),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **SIZES,
        head_dim=16,
        global_head_dim=16,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=48,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **{name: size for name, size in SIZES.items() if name != "num_attention_heads"},
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
        layers_block_type=["mamba", "moe", "attention", "moe"],
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=8,
    ),
    "dbrx": lambda: transformers.DbrxConfig(
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        vocab_size=96,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
TRANSPOSED = {"llama4_text", "gpt_oss"}  # whose stacks are [E, inputs, outputs]


@functools.cache
def _made(family: str) -> nn.Module:
    return random_model(CONFIGS[family]())


def made(family: str) -> nn.Module:
    return copy.deepcopy(_made(family))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def with_decoded_weights(family: str, quantised: nn.Module) -> nn.Module:
    """The model of transformers with each weight replaced by what the quantised one decodes."""
    plain = made(family)
    with torch.no_grad():
        stacks = [name for name, module in quantised.named_modules() if isinstance(module, QuantizedStack)]
        for name, module in quantised.named_modules():
            if any(name.startswith(f"{stack}.experts.") for stack in stacks):
                continue
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                own = plain.get_submodule(name).weight
                own.copy_(
                    module.weight.t()
                    if type(plain.get_submodule(name)).__name__ == "Conv1D"
                    else module.weight
                )
            if isinstance(module, QuantizedStack):
                plain.get_submodule(name).weight.copy_(module.weight)
            elif isinstance(module, QuantizedExperts):
                for stack in module.facts.names:
                    plain.get_submodule(name).get_parameter(stack).copy_(module.stack(stack))
    return plain


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 96, (4, 16), generator=generator) for _ in range(count)]
