"""Qwen3.5 as it is published: the language model inside a wrapper, whose vision tower is not run."""

from __future__ import annotations

from pymllm.models import qwen3_5_text

WRAPPER = True
DEFAULTS = qwen3_5_text.DEFAULTS
RENAMED = {
    # As the language model alone is written, and as mlx-vlm names its parts.
    r"model\.((?:layers|embed_tokens|norm)\..*)": r"model.language_model.\1",
    r"language_model\.model\.(.*)": r"model.language_model.\1",
    r"language_model\.(lm_head\..*)": r"\1",
}


class Model(qwen3_5_text.Model):
    """Qwen3_5ForConditionalGeneration, for text."""
