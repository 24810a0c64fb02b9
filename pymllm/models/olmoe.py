"""OLMoE: routed experts in every layer, and norms over all heads of q, and of k, together."""

# T tokens

from __future__ import annotations

from torch import Tensor, nn

from pymllm.attention.self_attention import WholeNormAttention
from pymllm.models import llama
from pymllm.moe import build_moe_block
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **llama.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_local_experts": 64,  # or num_experts, which comes first where a config has it
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "clip_qkv": None,
}


class OlmoeAttention(WholeNormAttention):
    """Norms, then an optional clip, then rotary positions."""

    def before_rotary(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise and clip.  q, k, v: [T, this rank's features of all heads].  Returns the same shapes."""
        q, k, v = super().before_rotary(q, k, v)
        clip: float | None = self.config.clip_qkv
        return (
            (q, k, v) if clip is None else (q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip))
        )


class Model(llama.Model):
    """OlmoeForCausalLM."""

    attention = OlmoeAttention

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_moe_block("auto", self.config, prefix=prefix, quant_config=quant_config)
