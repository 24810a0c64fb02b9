"""Gemma 3, the text model: Gemma 2 with norms of heads in place of soft caps, and two rotary bases.

Five layers of six slide, and have a base of their own.
"""

from __future__ import annotations

from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.models import gemma2

DEFAULTS = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


class Model(gemma2.Model):
    """Gemma3ForCausalLM."""

    qk_norm = GemmaRMSNorm
