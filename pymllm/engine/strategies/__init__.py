"""Decoding strategies: how a request's answer comes out of the model's logits, one file a strategy."""

from __future__ import annotations

from collections.abc import Sequence

from pymllm.engine.strategies.autoregressive import Autoregressive
from pymllm.engine.strategies.base import DecodingStrategy
from pymllm.engine.strategies.block_diffusion import BlockDiffusionStrategy
from pymllm.engine.strategies.draft_model import DraftModel
from pymllm.engine.strategies.prompt_lookup import PromptLookup
from pymllm.models.strategy import Strategy

__all__ = [
    "Autoregressive",
    "BlockDiffusionStrategy",
    "DecodingStrategy",
    "make_strategy",
    "refused_settings",
]


def make_strategy(chosen: Strategy) -> DecodingStrategy:
    """Make the strategy that was chosen for a model."""
    settings = chosen.settings
    if chosen.name == "block_diffusion":
        return BlockDiffusionStrategy(chosen)
    if chosen.name == "prompt_lookup":
        return PromptLookup(settings["drafts"], settings["longest"], settings["shortest"])
    if chosen.name == "draft_model":
        assert chosen.draft is not None
        return DraftModel(settings["drafts"], chosen.draft)
    return Autoregressive()


def refused_settings(name: str) -> Sequence[str]:
    """Return the settings of `SamplingParams` that the strategy of this name refuses."""
    classes: dict[str, type[DecodingStrategy]] = {
        "block_diffusion": BlockDiffusionStrategy,
        "prompt_lookup": PromptLookup,
        "draft_model": DraftModel,
    }
    return classes.get(name, Autoregressive).refuses
