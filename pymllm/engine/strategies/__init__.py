"""Decoding strategies: how a request's answer comes out of the model's logits, one file a strategy."""

from __future__ import annotations

from pymllm.engine.strategies.autoregressive import Autoregressive
from pymllm.engine.strategies.base import DecodingStrategy
from pymllm.engine.strategies.block_diffusion import BlockDiffusionStrategy
from pymllm.models.strategy import Strategy

__all__ = ["Autoregressive", "BlockDiffusionStrategy", "DecodingStrategy", "make_strategy"]


def make_strategy(chosen: Strategy) -> DecodingStrategy:
    """Make the strategy that was chosen for a model."""
    return BlockDiffusionStrategy(chosen) if chosen.name == "block_diffusion" else Autoregressive()
