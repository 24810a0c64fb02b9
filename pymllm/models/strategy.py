"""How a checkpoint's answers are decoded: the strategy, its settings, and where each of them came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockDiffusion:
    """What a family that is decoded block by block takes for granted where its checkpoints do not say it.

    block_length: tokens of a block.  mask_token_id: the token that stands at open positions.
    confidence_threshold: a proposed token is accepted above this probability.
    shifted: whether the logits at a position say what stands at the next one, as an autoregressive model's do.
    """

    block_length: int
    mask_token_id: int
    confidence_threshold: float
    shifted: bool = False
