"""SDAR: Qwen3 that was trained on to fill in blocks of masked tokens."""

from __future__ import annotations

from pymllm.models import qwen3
from pymllm.models.strategy import BlockDiffusion

DEFAULTS = qwen3.DEFAULTS
ARCHITECTURE = "SDARForCausalLM"
# Of the releases without a length in their name; <|MASK|>; the threshold of SDAR's README.
SETTINGS = BlockDiffusion(block_length=4, mask_token_id=151669, confidence_threshold=0.9)


class Model(qwen3.Model):
    """SDARForCausalLM."""

    block_diffusion = SETTINGS
