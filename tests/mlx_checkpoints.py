"""Tiny checkpoints as mlx-lm stores them, made from the words of quantization/mlx/README.md.

Legend: I in_features, O out_features, G group_size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints, moe_checkpoints
from .checkpoints import TinyCheckpoint, save_config, save_tensors

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
SWITCH = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """[O, I] codes to [O, I·bits/32] words, bit by bit: bit n of a row is bit n mod 32 of word n div 32."""
    stream = (codes.long()[..., None] >> torch.arange(bits)) & 1
    words = stream.flatten(1).unflatten(1, (-1, 32)) << torch.arange(32)
    return words.sum(-1).to(torch.uint32)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`, of words [..., W]."""
    stream = (words.long()[..., None] >> torch.arange(32)) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def decode(tensors: dict[str, Tensor], bits: int, mode: str = "affine") -> Tensor:
    """[O, I] float64: what a layer's tensors mean."""
    codes = unpack_bits(tensors["weight"], bits)
    groups = codes.unflatten(-1, (tensors["scales"].shape[-1], -1))
    if mode == "affine":
        scales, biases = (tensors[name].double()[..., None] for name in ("scales", "biases"))
        return (groups * scales + biases).flatten(-2)
    values = groups.to(torch.uint8).view(torch.float8_e4m3fn).double() if bits == 8 else E2M1.double()[groups]
    stored = tensors["scales"]
    scales = (
        stored.view(torch.float8_e4m3fn).double() if mode == "nvfp4" else torch.exp2(stored.double() - 127)
    )
    return (values * scales[..., None]).flatten(-2)


@dataclass(frozen=True)
class MLX:
    """One setting.  dtype: of affine scales and biases."""

    bits: int = 4
    group: int = 64
    mode: str = "affine"
    dtype: torch.dtype = torch.bfloat16

    def settings(self) -> dict[str, Any]:
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}

    def encode(self, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """weight: [O, I].  Returns the tensors by suffix, and the float32 weight that they mean."""
        groups = weight.float().unflatten(1, (-1, self.group))
        if self.mode == "affine":
            # Every other group counts down from its high end, so that its scale is negative.
            low, high = groups.amin(-1), groups.amax(-1)
            down = torch.arange(low.numel()).view_as(low) % 2 == 1
            scales = torch.where(down, low - high, high - low) / (2**self.bits - 1)
            scales, biases = scales.to(self.dtype), torch.where(down, high, low).to(self.dtype)
            codes = ((groups - biases.float()[..., None]) / scales.float()[..., None]).round()
            codes = codes.clamp(0, 2**self.bits - 1)
            tensors = {"scales": scales, "biases": biases}
        elif self.mode == "nvfp4":
            scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
            codes = (groups[..., None] / scales.float()[..., None, None] - E2M1).abs().argmin(-1)
            tensors = {"scales": scales.view(torch.uint8)}
        else:
            exponents = (groups.abs().amax(-1) / (6 if self.bits == 4 else 448)).log2().ceil()
            scaled = groups / 2 ** exponents[..., None]
            codes = (scaled[..., None] - E2M1).abs().argmin(-1)
            if self.bits == 8:
                codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
            tensors = {"scales": (exponents + 127).to(torch.uint8)}
        tensors["weight"] = pack_bits(codes.flatten(1), self.bits)
        return tensors, decode(tensors, self.bits, self.mode).float()


def write_mlx(
    folder: Path,
    family: str,
    choose: Callable[[str], MLX | None],
    quantization: dict[str, Any],
    *,
    edit: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> TinyCheckpoint:
    """Make `folder` with a random model of `family` in it.

    choose: a layer's setting, by the name that mlx-lm has for it; None: floats.  quantization: what config.json says.
    """
    moe = family in moe_checkpoints.FAMILIES
    if moe:
        model = moe_checkpoints.random_moe(moe_checkpoints.moe_config(family, **settings))
    else:
        model = checkpoints.random_model(checkpoints.tiny_config(family, **settings))
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}

    def store(name: str, weight: Tensor) -> Tensor:
        """Return the tensor that is meant.  name: with mlx-lm's own layer name."""
        layer, _, suffix = name.rpartition(".")
        setting = choose(layer) if suffix == "weight" and weight.ndim == 2 else None
        if setting is None:
            stacks.setdefault(name, []).append(weight.bfloat16())
            return weight.bfloat16().float()
        stored, meant = setting.encode(weight)
        for suffix, tensor in stored.items():
            stacks.setdefault(f"{layer}.{suffix}", []).append(tensor)
        return meant

    with torch.no_grad():
        for name, weight in moe_checkpoints.unstacked(model) if moe else model.state_dict().items():
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            stacks = {}
            found = EXPERT.fullmatch(name)
            if found is not None:
                name = f"{found[1]}.switch_mlp.{SWITCH.get(found[3], found[3])}.weight"
                weight.copy_(store(name, weight))
                tensors |= {
                    key: torch.stack([*tensors.get(key, ()), *parts]) for key, parts in stacks.items()
                }
                continue
            if family == "gpt_oss" and ".experts." in name:
                _store_apart(name, weight, store)
                tensors |= {key: torch.stack(parts) for key, parts in stacks.items()}
                continue
            if family == "deepseek_v3" and name.endswith("kv_b_proj.weight"):
                _store_absorbed(name, weight, model.config, store)
                tensors |= {key: torch.stack(parts) for key, parts in stacks.items()}
                continue
            weight.copy_(store(name, weight))
            tensors |= {key: parts[0] for key, parts in stacks.items()}

    def config(raw: dict[str, Any]) -> None:
        raw["quantization"] = raw["quantization_config"] = quantization
        if edit is not None:
            edit(raw)

    save_config(folder, model, torch.bfloat16, None, config)
    save_tensors(folder, tensors)
    return TinyCheckpoint(folder, model, ())


def _store_apart(name: str, weight: Tensor, store: Callable[[str, Tensor], Tensor]) -> None:
    """Store gpt-oss' experts, whose gate and up lie in turns, and whose weights are [E, I, O] in the model."""
    prefix, _, last = name.rpartition(".")
    suffix = "bias" if last.endswith("_bias") else "weight"
    products = {"down_proj": weight}
    if last.startswith("gate_up"):
        products = {"gate_proj": weight[..., 0::2], "up_proj": weight[..., 1::2]}
    for product, part in products.items():
        for expert in part:
            expert.copy_(
                store(f"{prefix}.{product}.{suffix}", expert.t() if suffix == "weight" else expert).t()
            )


def _store_absorbed(name: str, weight: Tensor, config: Any, store: Callable[[str, Tensor], Tensor]) -> None:
    """Store the keys' and the values' rows of kv_b_proj, head by head; those of keys with inputs for outputs."""
    prefix, keys = name.removesuffix("kv_b_proj.weight"), config.qk_nope_head_dim
    for head in weight.unflatten(0, (config.num_attention_heads, -1)):
        head[:keys] = store(f"{prefix}embed_q.weight", head[:keys].t()).t()
        head[keys:] = store(f"{prefix}unembed_out.weight", head[keys:])
