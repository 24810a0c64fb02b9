"""Tiny checkpoints of families that are decoded by blocks, and what they answer by the plain formula in float64.

No library that is installed has these classes. Names and formulas are those of the authors' modelling files.
"""

# T tokens, V vocabulary, H query heads, Hkv key heads, D head size, E experts, B block length

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.engine.runner import Runner
from pymllm.layers.step import AttnMetaDataBase

from .checkpoints import FORMATS, SIZES, Plain, Writer, load_tensors, save_tensors

LLADA2: dict[str, Any] = {
    **{"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "num_shared_experts": 1},
    **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1},
    **{"partial_rotary_factor": 0.5, "rotary_dim": 16, "use_qkv_bias": False, "use_bias": False},
    **{"norm_topk_prob": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}
MIXED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
# By page: model_type, the class in config.json, and settings of its own.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sdar": ("sdar", "SDARForCausalLM", {}),
    "sdar_moe": ("sdar_moe", "SDARMoeForCausalLM", {**MIXED, "mlp_only_layers": [0]}),
    "fast_dllm_qwen": ("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", {}),
    "llada2_moe": ("llada2_moe", "LLaDA2MoeModelLM", LLADA2),
    "llada2_moe_veomni": ("llada2_moe_veomni", "LLaDA2MoeModelLM", LLADA2),
}
ROUTERS = ("mlp.gate",)


@dataclass(frozen=True)
class BlockCheckpoint:
    """folder: the checkpoint.  config: its config.json.  weights: what it means, float64, experts one by one."""

    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by name."""
        return load_tensors(self.folder)

    @cached_property
    def ids(self) -> Tensor:
        """[24] random token ids."""
        return torch.randint(0, self.config["vocab_size"], (24,), generator=torch.Generator().manual_seed(3))

    def logits(self, ids: Tensor | None = None, block_length: int = 1) -> Tensor:
        """[T, V] float64 by the formula.  ids: [T].  block_length: 1 is causal."""
        return formula(self.config, self.weights, self.ids if ids is None else ids, block_length)


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a model, experts one by one."""
    hidden, dim, vocab = config["hidden_size"], config["head_dim"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    llada, fast = config["model_type"].startswith("llada2"), config["model_type"].startswith("Fast")

    def mlp(name: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.gate_proj.weight", (inner, hidden)
        yield f"{name}.up_proj.weight", (inner, hidden)
        yield f"{name}.down_proj.weight", (hidden, inner)

    yield ("model.word_embeddings.weight" if llada else "model.embed_tokens.weight"), (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if llada:
            yield f"{at}.attention.query_key_value.weight", (q + 2 * kv, hidden)
            yield f"{at}.attention.dense.weight", (hidden, q)
            if config["use_qkv_bias"]:
                yield f"{at}.attention.query_key_value.bias", (q + 2 * kv,)
            if config["use_bias"]:
                yield f"{at}.attention.dense.bias", (hidden,)
        else:
            for name, outputs in (("q", q), ("k", kv), ("v", kv)):
                yield f"{at}.self_attn.{name}_proj.weight", (outputs, hidden)
                if fast:
                    yield f"{at}.self_attn.{name}_proj.bias", (outputs,)
            yield f"{at}.self_attn.o_proj.weight", (hidden, q)
        if not fast:
            names = ("attention.query_layernorm", "attention.key_layernorm")
            for norm in names if llada else ("self_attn.q_norm", "self_attn.k_norm"):
                yield f"{at}.{norm}.weight", (dim,)
        if not is_sparse(config, layer):
            yield from mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", (config["num_experts"], hidden)
        if config.get("moe_router_enable_expert_bias"):
            yield f"{at}.mlp.gate.expert_bias", (config["num_experts"],)
        for expert in range(config["num_experts"]):
            yield from mlp(f"{at}.mlp.experts.{expert}", config["moe_intermediate_size"])
        if config.get("num_shared_experts"):
            inner = config["num_shared_experts"] * config["moe_intermediate_size"]
            yield from mlp(f"{at}.mlp.shared_experts", inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def is_sparse(config: dict[str, Any], layer: int) -> bool:
    if "first_k_dense_replace" in config:
        return layer >= config["first_k_dense_replace"]
    return "num_experts" in config and layer not in config["mlp_only_layers"]


def write_blocks(
    folder: Path,
    family: str,
    fmt: str | Writer = "none",
    *,
    seed: int = 0,
    edit_config: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> BlockCheckpoint:
    """Make `folder` with a random model of a page in it; linear layers and experts are stored in `fmt`.

    Experts of llada2_moe_veomni are stored as its training code has them: of a layer all in one tensor, plain.
    edit_config: changes config.json's values before they are written.  settings: of the config.
    """
    model_type, architecture, own = FAMILIES[family]
    config = {"model_type": model_type, "architectures": [architecture], "tie_word_embeddings": False}
    config |= SIZES | {"hidden_act": "silu", "rope_theta": 5000.0} | own | settings
    config.setdefault("mask_token_id", config["vocab_size"] - 1)
    writer = FORMATS[fmt] if isinstance(fmt, str) else fmt
    plain = writer if isinstance(writer, Plain) else Plain()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, shape in shapes(config):
        noise = torch.randn(shape, generator=generator)
        layer, _, suffix = name.rpartition(".")
        is_matrix = ".layers." in name and len(shape) == 2 and not layer.endswith(ROUTERS)
        if "norm" in name:
            value = 1 + 0.1 * noise
        elif len(shape) == 1:
            value = 0.3 * noise
        else:
            value = noise * (1.0 if "embed" in name else shape[1] ** -0.5)
        stored, meant = (writer if is_matrix else plain).encode(value)
        if suffix == "expert_bias":
            stored, meant = {"weight": value}, value
        weights[name] = meant.double()
        tensors |= {f"{layer}.{suffix if key == 'weight' else key}": kept for key, kept in stored.items()}
    if family == "llada2_moe_veomni":
        tensors = merge_experts(config, tensors)
    raw = {**config, "torch_dtype": str(plain.dtype).removeprefix("torch.")}
    routers = tuple(f"model.layers.{i}.mlp.gate" for i in range(config["num_hidden_layers"]))
    quantization = writer.config(tuple(r for r in routers if f"{r}.weight" in tensors))
    if quantization is not None:
        raw["quantization_config"] = quantization
    if edit_config is not None:
        edit_config(raw)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_tensors(folder, tensors)
    return BlockCheckpoint(folder, config, weights)


def merge_experts(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put each product's experts side by side, [E, O, I], under the product's name without ".weight"."""
    merged = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        prefix, found, product = name.partition(".experts.0.")
        if found:
            experts = [tensors[f"{prefix}.experts.{e}.{product}"] for e in range(config["num_experts"])]
            merged[f"{prefix}.experts.{product.removesuffix('.weight')}"] = torch.stack(experts)
    return merged


def formula(config: dict[str, Any], weights: dict[str, Tensor], ids: Tensor, block_length: int) -> Tensor:
    """Compute the logits [T, V] in float64, a query and an expert at a time."""
    llada = config["model_type"].startswith("llada2")
    heads, kv_heads, dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    turned = int(dim * config.get("partial_rotary_factor", 1))

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ weights[f"{name}.weight"].t()
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    def norm(x: Tensor, name: str) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
        return y * weights[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        """Turn pairs as complex numbers.  x: [T, heads, D]."""
        first, second, rest = x.split([turned // 2, turned // 2, dim - turned], -1)
        speed = config["rope_theta"] ** -(torch.arange(0, turned, 2).double() / turned)
        angle = torch.arange(len(x)).double()[:, None, None] * speed
        pairs = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag, rest), -1)

    def attend(x: Tensor, at: str) -> Tensor:
        if llada:
            both = linear(x, f"{at}.attention.query_key_value").unflatten(-1, (-1, dim))
            q, k, v = both[:, :heads], both[:, heads : heads + kv_heads], both[:, heads + kv_heads :]
            q, k = norm(q, f"{at}.attention.query_layernorm"), norm(k, f"{at}.attention.key_layernorm")
        else:
            q, k, v = (linear(x, f"{at}.self_attn.{n}_proj").unflatten(-1, (-1, dim)) for n in "qkv")
            if f"{at}.self_attn.q_norm.weight" in weights:
                q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        q, k, rows = turn(q), turn(k), []
        for position in range(len(x)):
            end = (position // block_length + 1) * block_length
            for head in range(heads):
                mine = head * kv_heads // heads
                scores = k[:end, mine] @ q[position, head] / math.sqrt(dim)
                rows.append(scores.softmax(0) @ v[:end, mine])
        mixed = torch.stack(rows).view(len(x), heads * dim)
        return linear(mixed, f"{at}.attention.dense" if llada else f"{at}.self_attn.o_proj")

    def mlp(x: Tensor, at: str) -> Tensor:
        gate = linear(x, f"{at}.gate_proj")
        return linear(gate * gate.sigmoid() * linear(x, f"{at}.up_proj"), f"{at}.down_proj")

    def choose(logits: Tensor, at: str) -> dict[int, Tensor]:
        """The experts of one token, and their weights.  logits: [E]."""
        count = config["num_experts_per_tok"]
        if not llada:
            chances = logits.softmax(0)
            best = sorted(range(len(chances)), key=lambda e: -chances[e])[:count]
            return {e: chances[e] / sum(chances[b] for b in best) for e in best}
        scores = logits.sigmoid()
        ranks = scores + weights.get(f"{at}.gate.expert_bias", 0)
        size = len(ranks) // config["n_group"]
        groups = [range(first, first + size) for first in range(0, len(ranks), size)]
        groups.sort(key=lambda group: -sum(sorted((float(ranks[e]) for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: config["topk_group"]] for e in group]
        best = sorted(allowed, key=lambda e: -ranks[e])[:count]
        total = sum(scores[e] for e in best) + 1e-20
        return {e: scores[e] / total * config["routed_scaling_factor"] for e in best}

    def experts(x: Tensor, at: str) -> Tensor:
        logits = linear(x, f"{at}.gate")
        y = torch.stack(
            [
                torch.stack([w * mlp(row, f"{at}.experts.{e}") for e, w in choose(one, at).items()]).sum(0)
                for row, one in zip(x, logits, strict=True)
            ]
        )
        return y + mlp(x, f"{at}.shared_experts") if config.get("num_shared_experts") else y

    table = weights["model.word_embeddings.weight" if llada else "model.embed_tokens.weight"]
    x = table[ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        x = x + attend(norm(x, f"{at}.input_layernorm"), at)
        h = norm(x, f"{at}.post_attention_layernorm")
        x = x + (experts if is_sparse(config, layer) else mlp)(h, f"{at}.mlp")
    return norm(x, "model.norm") @ weights.get("lm_head.weight", table).t()


def block_logits(model: Any, ids: Tensor, block_length: int) -> Tensor:
    """Compute the logits [T, V] of one text without a cache, attending by blocks.  ids: [T]."""
    count = len(ids)
    bounds = torch.tensor([0, count], dtype=torch.int32)
    metadata = AttnMetaDataBase(
        is_prefill=True,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=count,
        max_seqlen_k=count,
        context_lens=bounds[1:],
        query_starts=(0, count),
        lengths=(count,),
        block_size=block_length,
        prefix_causal=False,
    )
    runner = Runner(model, torch.device("cpu"))
    with torch.no_grad():
        return runner._forward(ids, torch.arange(count), metadata, [None] * count)
