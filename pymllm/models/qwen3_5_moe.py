"""Qwen3.5-MoE as it is published: the language model inside a wrapper, whose vision tower is not run."""

from __future__ import annotations

from pymllm.models import qwen3_5, qwen3_5_moe_text

WRAPPER = True
DEFAULTS = qwen3_5_moe_text.DEFAULTS
RENAMED = qwen3_5.RENAMED


class Model(qwen3_5_moe_text.Model):
    """Qwen3_5MoeForConditionalGeneration, for text."""
