"""Checkpoints with random weights, from a config.json alone: what a model has to hold, its own layers say.

Needs neither transformers nor the safetensors package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm import LLM
from pymllm.config import Execution
from pymllm.layers.held import weight_holders
from pymllm.loading.prepare import build_on_meta
from pymllm.models import read_model_config
from pymllm.parallel import Parallel
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.rules import RuledConfig, read_kv_rules, read_rules
from pymllm.writing.safetensors_container import write_tensors

GROUP = 128
SIZES: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 1024},
    **{"rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
EIGHT_B = SIZES | {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192},
}
EXPERTS = {
    **{"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    **{"mlp_only_layers": [], "decoder_sparse_step": 1},
}
GATED_DELTA = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4},
    **{"linear_key_head_dim": 32, "linear_num_value_heads": 8, "linear_value_head_dim": 32},
    **{"linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25},
}


def awq(sizes: dict[str, Any], kind: str = "llama", architecture: str = "LlamaForCausalLM") -> dict[str, Any]:
    """Return the config of an int4 model in AutoAWQ's layout."""
    kept = ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(sizes["num_hidden_layers"]))]
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    if "num_experts" not in sizes:
        kept = kept[:1]
    return plain(sizes, kind, architecture) | {
        "torch_dtype": "float16",
        "quantization_config": settings | {"modules_to_not_convert": kept},
    }


def plain(sizes: dict[str, Any], kind: str, architecture: str) -> dict[str, Any]:
    """Return the config of a model in bfloat16."""
    return {**sizes, "model_type": kind, "architectures": [architecture], "torch_dtype": "bfloat16"}


def mixture() -> dict[str, Any]:
    return awq(SIZES | EXPERTS, "qwen3_moe", "Qwen3MoeForCausalLM")


def hybrid() -> dict[str, Any]:
    return plain(SIZES | GATED_DELTA, "qwen3_5_text", "Qwen3_5ForCausalLM")


def in_blocks() -> dict[str, Any]:
    return plain(SIZES | {"mask_token_id": SIZES["vocab_size"] - 1}, "sdar", "SDARForCausalLM")


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield the name, the shape and the dtype of each tensor that a checkpoint of this config has."""
    settings = config.get("quantization_config") or {"quant_method": "none"}
    stored = get_quantization_config(settings["quant_method"]).from_config(settings)
    rules = RuledConfig(stored, read_rules(None), read_kv_rules(None))
    dtype = getattr(torch, config["torch_dtype"])
    model = build_on_meta(read_model_config(config), rules, Execution(device="cpu", dtype=dtype), Parallel())
    for name, holder in weight_holders(model):
        if holder.loads:
            for place in holder.places(name):
                yield place.slot.tensor, place.slot.source_shape, place.slot.spec.dtype


def write_model(folder: Path, config: dict[str, Any], where: torch.device, seed: int = 0) -> Path:
    """Make `folder` with a model of random weights, which keep activations near one.  where: draws them."""
    generator = torch.Generator(device=where).manual_seed(seed)
    tensors = {
        name: random_tensor(name, shape, dtype, generator, where).cpu()
        for name, shape, dtype in tensors_of(config)
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, where: torch.device
) -> Tensor:
    """Draw a tensor as its name asks for: words of int4, their scales, norms, matrices."""
    if dtype is torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype, device=where, generator=generator)
    if name.endswith(".scales"):
        # Codes and zero points are 6.5 apart, by their standard deviation.
        size = (shape[0] * GROUP) ** -0.5 / 6.5
        return ((torch.rand(shape, device=where, generator=generator) + 0.5) * size).to(dtype)
    noise = torch.randn(shape, device=where, generator=generator)
    if "norm" in name:
        return (1 + 0.1 * noise).to(dtype)
    if len(shape) < 2 or "embed" in name:
        return (noise * (0.3 if len(shape) < 2 else 1.0)).to(dtype)
    return (noise * shape[-1] ** -0.5).to(dtype)


def write_adapter(folder: Path, llm: LLM, rank: int = 8) -> Path:
    """Make a LoRA adapter for every down_proj of a model, large enough to change its answers."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(llm.model.model.layers):
        shape = layer.mlp.down_proj.shape
        name = f"base_model.model.model.layers.{index}.mlp.down_proj.lora_{{}}.weight"
        inputs, outputs = shape.in_features, shape.out_features
        tensors[name.format("A")] = torch.randn(rank, inputs, generator=generator) * 0.1
        tensors[name.format("B")] = torch.randn(outputs, rank, generator=generator) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
