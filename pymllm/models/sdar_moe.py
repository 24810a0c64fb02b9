"""SDAR with routed experts: Qwen3-MoE that was trained on to fill in blocks of masked tokens."""

from __future__ import annotations

from pymllm.models import qwen3_moe, sdar

DEFAULTS = qwen3_moe.DEFAULTS
ARCHITECTURE = "SDARMoeForCausalLM"


class Model(qwen3_moe.Model):
    """SDARMoeForCausalLM."""

    block_diffusion = sdar.SETTINGS
