"""Gemma 2: Gemma with a norm after attention and MLP too, soft caps on logits, and every other layer sliding."""

# T tokens, H hidden size, V vocabulary

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.mlp import GatedMLP
from pymllm.models import gemma
from pymllm.models.causal_lm import DecoderLayer
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    **gemma.DEFAULTS,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


class FourNormLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    read_by: ClassVar[dict[str, str]] = {"self_attn": "input_layernorm", "mlp": "pre_feedforward_layernorm"}

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, norm: type[RMSNorm] = RMSNorm
    ) -> None:
        super().__init__(config, self_attn, mlp, norm)
        self.pre_feedforward_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)
        self.post_feedforward_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """positions: [T]; hidden, residual: [T, H].  Returns this layer's output and the sum before it."""
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden, taker=self.self_attn)
        else:
            hidden, residual = self.input_layernorm(hidden, residual, self.self_attn)
        hidden = self.post_attention_layernorm(self.self_attn(positions, hidden))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual, self.mlp)
        return self.post_feedforward_layernorm(self.mlp(hidden)), residual


class Model(gemma.Model):
    """Gemma2ForCausalLM."""

    layer = FourNormLayer
    qk_norm: ClassVar[type[RMSNorm] | None] = None

    def make_attention(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        bias = self.config.attention_bias
        return SelfAttention(
            self.config,
            index,
            prefix=prefix,
            quant_config=quant_config,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=self.qk_norm,
            scale=self.config.number("query_pre_attn_scalar") ** -0.5,
            soft_cap=self.config.number_or_none("attn_logit_softcapping"),
        )

    def make_mlp(self, index: int, prefix: str, quant_config: QuantizationConfig | None) -> nn.Module:
        return GatedMLP(
            self.config.size("hidden_size"),
            self.config.size("intermediate_size"),
            self.config.hidden_activation,
            prefix=prefix,
            quant_config=quant_config,
        )

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """hidden: [N, H].  Returns float32 logits [N, V], capped; None on ranks that do not get them."""
        logits = super().compute_logits(hidden, gather_all)
        cap = self.config.number_or_none("final_logit_softcapping")
        return logits if logits is None or cap is None else (logits / cap).tanh() * cap
