"""Tiny checkpoints with experts: as `tests/checkpoints.py`, and every layout that experts are stored in."""

# E experts, H hidden size, I intermediate size, O out_features

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoints import (
    FORMATS,
    HYBRID,
    Plain,
    TinyCheckpoint,
    Writer,
    save_config,
    save_tensors,
    tiny_config,
)

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "intermediate_size": 256}
LATENT = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
}
# Five or six experts, so that ranks have different numbers of them; five are fewer than two for each of four ranks.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"num_experts": 6, "shared_expert_intermediate_size": 256, "intermediate_size": 256},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"num_experts": 6, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        EXPERTS | HYBRID | {"num_experts": 6, "shared_expert_intermediate_size": 256},
    ),
    "qwen3_next": (
        "Qwen3Next",
        EXPERTS | HYBRID | {"num_experts": 6, "shared_expert_intermediate_size": 256},
    ),
    "olmoe": ("Olmoe", EXPERTS | {"num_experts": 6, "intermediate_size": 128}),
    "deepseek_v2": (
        "DeepseekV2",
        EXPERTS | LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", EXPERTS | LATENT | {"q_lora_rank": 32}),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 128,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": 7},
    ),
}
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True)
class MXFP4:
    """Four-bit floats with a power of two for every 32 inputs.  dtype: of what is not quantised."""

    dtype: torch.dtype = torch.float32

    def config(self, ignored: tuple[str, ...]) -> dict[str, Any] | None:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(ignored) or None}

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, scales, meant = encode_mxfp4(weight)
        return {"weight": packed.flatten(1), "weight_scale": scales}, meant


def encode_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[O, I] floats to bytes [O, I/32, 16] (the even code low), exponents [O, I/32], and what they mean."""
    blocks = weight.double().unflatten(1, (-1, 32))  # [O, I/32, 32]
    exponents = blocks.abs().amax(-1).log2().floor() - 2  # the largest lies in 4..8, cut off at 6
    scaled = blocks / 2 ** exponents.unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    meant = E2M1.double()[codes] * scaled.sign() * 2 ** exponents.unsqueeze(-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, (exponents + 127).to(torch.uint8), meant.flatten(1).float()


MOE_FORMATS: dict[str, Writer] = FORMATS | {"mxfp4": MXFP4()}


def moe_config(family: str, **settings: Any) -> Any:
    """Make transformers' config of a tiny model of this family."""
    return tiny_config(family, FAMILIES, **settings)


def random_moe(config: Any, seed: int = 0) -> Any:
    """A float32 model whose weights keep activations near one, and whose router tells tokens apart."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    buffers = [(name, b) for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, param in (*model.named_parameters(), *buffers):
            noise = torch.randn(param.shape, generator=generator)
            last = name.rpartition(".")[2]
            if "norm" in name:
                param.copy_(1 + 0.1 * noise)
            elif param.ndim == 1 or "bias" in last or last == "sinks":
                param.copy_(0.3 * noise)
            else:
                inputs = param.shape[1 if "experts" in name and config.model_type == "gpt_oss" else -1]
                param.copy_(noise * (1.0 if "embed" in name else inputs**-0.5))
    return model


def unstacked(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that checkpoints have for it, as a view of the model's own; experts one by one."""
    mixtral, oss = (model.config.model_type == name for name in ("mixtral", "gpt_oss"))
    for name, tensor in model.state_dict().items():
        prefix, found, product = name.partition(".experts.")
        if mixtral:
            prefix = prefix.replace(".mlp", ".block_sparse_moe")
        if not found or oss:
            yield prefix + found + product, tensor
            continue
        for expert, weight in enumerate(tensor):
            at = f"{prefix}.experts.{expert}"
            if product == "down_proj":
                yield f"{at}.{'w2' if mixtral else 'down_proj'}.weight", weight
            else:
                gate, up = weight.chunk(2)
                yield f"{at}.{'w1' if mixtral else 'gate_proj'}.weight", gate
                yield f"{at}.{'w3' if mixtral else 'up_proj'}.weight", up


def write_moe(
    folder: Path,
    family: str,
    fmt: str | Writer = "none",
    *,
    stacked: bool = False,
    shards: int = 1,
    seed: int = 0,
    edit_config: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> TinyCheckpoint:
    """Make `folder` with a random model of `family` in it.

    fmt: how the decoder's linear layers and experts are stored; of gpt_oss, MXFP4 is for the experts alone, as there.
    stacked: all experts of a layer in one tensor, as transformers 5 has them in memory; plain formats only.
    """
    config = moe_config(family, **settings)
    model = random_moe(config, seed)
    writer = MOE_FORMATS[fmt] if isinstance(fmt, str) else fmt
    plain = writer if isinstance(writer, Plain) else Plain()
    oss = family == "gpt_oss"
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items() if stacked else unstacked(model):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer, _, suffix = name.rpartition(".")
        is_matrix = ".layers." in name and suffix == "weight" and weight.ndim == 2
        if oss and ".experts." in name and weight.ndim == 3 and isinstance(writer, MXFP4):
            encoded = [encode_mxfp4(expert.t()) for expert in weight]
            tensors[f"{name}_blocks"] = torch.stack([blocks for blocks, _, _ in encoded])
            tensors[f"{name}_scales"] = torch.stack([scales for _, scales, _ in encoded])
            with torch.no_grad():
                weight.copy_(torch.stack([meant.t() for _, _, meant in encoded]))
            continue
        quantised = is_matrix and not layer.endswith(ROUTERS) and not (oss and isinstance(writer, MXFP4))
        stored, meant = (writer if quantised else plain).encode(weight)
        if name.endswith("e_score_correction_bias"):
            stored, meant = {"weight": weight}, weight
        with torch.no_grad():
            weight.copy_(meant)
        tensors |= {f"{layer}.{suffix if key == 'weight' else key}": value for key, value in stored.items()}
    routers = tuple(
        layer for layer in {name.rpartition(".")[0] for name in tensors} if layer.endswith(ROUTERS)
    )
    save_config(folder, model, plain.dtype, writer.config(routers), edit_config)
    save_tensors(folder, tensors, shards)
    return TinyCheckpoint(folder, model, ())
