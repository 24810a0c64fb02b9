"""What rules cannot reach in a class's model: weights of two dimensions or more that stay plain floats, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pymllm.layers.held import WeightHolder

LARGE = 0.05  # of a model's weights


def find_unreached(model: nn.Module, experts: Mapping[str, Any]) -> dict[str, str]:
    """Say of each such weight, by the name that a rule would have for it, why it stays as it is.

    experts: what was found out about modules that stack experts, a reason where ours do not take their place.
    """
    found: dict[str, str] = {}
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, WeightHolder):
            inside.update(module.modules())
        if module in inside:
            continue
        for name, param in module._parameters.items():
            if (
                param is None
                or param.ndim < 2
                or not param.is_floating_point()
                or max(param.shape) == param.numel()
            ):
                continue
            said = experts.get(path)
            reason = said if isinstance(said, str) else _reason(module)
            found[path if name == "weight" else f"{path}.{name}"] = reason
    return found


def notes_of(model: nn.Module, unreached: Mapping[str, str]) -> list[str]:
    """Say of those weights that are a large part of the model that no rule can reach them, and why."""
    sizes = {n.removesuffix(".weight"): p.numel() for n, p in model.named_parameters()}
    whole, notes = sum(sizes.values()), []
    for reason in dict.fromkeys(unreached.values()):
        names = [name for name, why in unreached.items() if why == reason]
        part = sum(sizes[name] for name in names) / max(whole, 1)
        if part >= LARGE:
            notes.append(
                f"{part:.0%} of the weights stay as they are, whatever rules say: {names[0]}: {reason}"
            )
    return notes


def _reason(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Conv1d):
        return "it is a convolution"
    if hasattr(module, "in_features") or hasattr(module, "embedding_dim"):
        return f"{kind} has a forward of its own, or is never called"
    return f"{kind} computes with it itself"
