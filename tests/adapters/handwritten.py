"""Adapters for the tiny checkpoints, written by hand, and what transformers' model gives with their products added."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pymllm import LLM

from ..checkpoints import TinyCheckpoint


def random_adapter(
    folder: Path,
    checkpoint: TinyCheckpoint,
    targets: Sequence[str],
    rank: int = 4,
    alpha: float = 12,
    seed: int = 0,
) -> dict[str, Tensor]:
    """An adapter for a tiny checkpoint, written by hand.  Returns scaling · B @ A by layer name."""
    draw = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for name, module in checkpoint.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            A = torch.randn(rank, module.in_features, generator=draw) * module.in_features**-0.5
            B = torch.randn(module.out_features, rank, generator=draw) * 0.2
            tensors[f"base_model.model.{name}.lora_A.weight"] = A
            tensors[f"base_model.model.{name}.lora_B.weight"] = B
            deltas[name] = alpha / rank * (B.double() @ A.double())
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def with_deltas(checkpoint: TinyCheckpoint, deltas: Mapping[str, Tensor]) -> Tensor:
    """transformers' logits with these added to its weights."""
    modules = dict(checkpoint.model.named_modules())
    before = {name: modules[name].weight.data.clone() for name in deltas}
    for name, delta in deltas.items():
        modules[name].weight.data += delta.float()
    logits = checkpoint.logits()
    for name, weight in before.items():
        modules[name].weight.data = weight
    return logits


def adapter_for_shipped(folder: Path, llm: LLM) -> None:
    """An adapter on every down_proj of the shipped model, large enough to change its answers."""
    shape = llm.model.model.layers[0].mlp.down_proj.shape
    draw = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.{}.mlp.down_proj.lora_{}.weight"
    tensors = {}
    for index in range(len(llm.model.model.layers)):
        tensors[name.format(index, "A")] = torch.randn(4, shape.in_features, generator=draw) * 0.1
        tensors[name.format(index, "B")] = torch.randn(shape.out_features, 4, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
