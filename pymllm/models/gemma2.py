"""Gemma 2: Gemma with a norm after attention and MLP too, soft caps on logits, and every other layer sliding."""

# T tokens, H hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import gemma
from pymllm.models.causal_lm import DecoderLayer
from pymllm.weights.gguf_architecture import LAYER_MODULES, GGUFArchitecture

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
NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def attention_scale(layers_of_27b: int) -> Callable[[dict[str, Any]], None]:
    """Make the function that sets query_pre_attn_scalar, which no file has.

    layers_of_27b: of the one size that divides by the hidden size over the heads in place of the head size.
    """

    def finish(config: dict[str, Any]) -> None:
        large = config["num_hidden_layers"] == layers_of_27b
        size = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
        config["query_pre_attn_scalar"] = size

    return finish


GGUF = {
    "gemma2": GGUFArchitecture(
        "gemma2",
        LAYER_MODULES | NORMS,
        norms_raised_by=1.0,
        settings={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed={"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        sliding=2,
        finish=attention_scale(46),
    )
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
        """Run the layer.  positions: [T]; hidden, residual: [T, H].  Returns its output and the sum before it."""
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

    def attention_options(self) -> dict[str, Any]:
        return {
            **super().attention_options(),
            "qk_norm": self.qk_norm,
            "scale": self.config.number("query_pre_attn_scalar") ** -0.5,
            "soft_cap": self.config.number_or_none("attn_logit_softcapping"),
        }

    def mlp_options(self) -> dict[str, Any]:
        return {"activation": self.config.hidden_activation}

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """Apply the head and its cap.  hidden: [N, H].  Returns float32 [N, V]; None on ranks that do not get them."""
        logits = super().compute_logits(hidden, gather_all)
        cap = self.config.number_or_none("final_logit_softcapping")
        return logits if logits is None or cap is None else (logits / cap).tanh() * cap
