"""Gemma 3, the text model: Gemma 2 with norms of heads in place of soft caps, and two rotary bases.

Five layers of six slide, and have a base of their own.
"""

from __future__ import annotations

from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.models import gemma2
from pymllm.weights.gguf_architecture import LAYER_MODULES, GGUFArchitecture

DEFAULTS = {
    **gemma2.DEFAULTS,
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GGUF = {
    "gemma3": GGUFArchitecture(
        "gemma3_text",
        LAYER_MODULES | gemma2.NORMS,
        norms_raised_by=1.0,
        settings={"final_logit_softcapping": "final_logit_softcapping"},
        sliding=6,
        sliding_theta=10000.0,
        sliding_scaled=False,
        finish=gemma2.attention_scale(62),
    )
}


class Model(gemma2.Model):
    """Gemma3ForCausalLM."""

    qk_norm = GemmaRMSNorm
