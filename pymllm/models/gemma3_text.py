"""Gemma 3, the text model: Gemma 2 with norms of heads in place of soft caps, and two rotary bases.

Five layers of six slide, and have a base of their own.
"""

from __future__ import annotations

from typing import Any

from pymllm.config import ModelConfig
from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.models import gemma2
from pymllm.models.encoder import SEES_LATER
from pymllm.quantization.base import QuantizationConfig
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
    """Gemma3ForCausalLM; or an encoder, without a head (EmbeddingGemma)."""

    qk_norm = GemmaRMSNorm
    both_ways = True

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        self.sees_all = bool(config.use_bidirectional_attention)
        super().__init__(config.without_head() if self.sees_all else config, quant_config)

    @property
    def why_no_text(self) -> str | None:
        """The reason why the model cannot generate text; None: it can."""
        return SEES_LATER if self.sees_all else super().why_no_text

    def attention_options(self) -> dict[str, Any]:
        return {**super().attention_options(), "bidirectional": self.sees_all}
