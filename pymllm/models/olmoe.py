"""OLMoE: routed experts in every layer, and norms over all heads of q, and of k, together."""

# T tokens, N features of all heads

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.moe import build_moe_block
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.spec import Span

DEFAULTS = {
    **llama.DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "num_local_experts": 64,  # or num_experts, which comes first where a config has it
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "clip_qkv": None,
}


class DividedRMSNorm(RMSNorm):
    """RMSNorm over features that ranks share: each brings its own to the mean."""

    def __init__(self, total: int, share: Span, eps: float) -> None:
        super().__init__(total, eps)
        self.total, self.share, self.parallel = total, share, current_parallel()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise x: [T, this rank's share of N].  Returns the same shape."""
        if self.parallel.size == 1:
            return super().forward(x)  # type: ignore[return-value]
        assert self.weight is not None
        squares = self.parallel.all_reduce(x.float().square().sum(-1, keepdim=True))
        summed = self.parallel.size * self.share.size  # more than the total where ranks share a head
        normed = x.float() * torch.rsqrt(squares / summed + self.eps)
        return normed.to(x.dtype) * self.weight[self.share.start : self.share.stop]


class OlmoeAttention(SelfAttention):
    """Norms, then an optional clip, then rotary positions."""

    def __init__(self, config: ModelConfig, layer: int, **options: Any) -> None:
        super().__init__(config, layer, **options)
        eps, (q, k, _) = config.rms_norm_eps, self.qkv_proj.shape.outputs
        self.q_norm, self.k_norm = DividedRMSNorm(q.total, q, eps), DividedRMSNorm(k.total, k, eps)
        self.clip: float | None = config.clip_qkv

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split([span.size for span in self.qkv_proj.shape.outputs], dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # type: ignore[misc]
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        q, k = self.rotary(positions, q, k)
        return self.o_proj(self.attn(q, k, v))


class Model(llama.Model):
    """OlmoeForCausalLM."""

    attention = OlmoeAttention

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return build_moe_block("auto", self.config, prefix=prefix, quant_config=quant_config)
