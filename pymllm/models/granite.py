"""Granite: Llama with a factor each on embedded tokens, attention's logits, what blocks add, and the head's logits.

The head's logits are divided by theirs; the others are multiplied.
"""

# T tokens, N rows that need logits, H hidden size, V vocabulary

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.models.causal_lm import DecoderLayer
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import GGUFArchitecture

DEFAULTS = {
    **llama.DEFAULTS,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
GGUF_FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
GGUF_CONSTANTS: dict[str, tuple[Any, ...]] = {"rope.scaling.finetuned": (True,)}  # false: no rotary positions


def fill_in_factors(config: dict[str, Any]) -> None:
    """Set the factors that a GGUF file leaves out, or has as 0: attention's is as usual, the others are 1."""
    usual = {"attention_multiplier": config["head_dim"] ** -0.5}
    for name in GGUF_FACTORS.values():
        config[name] = config.get(name) or usual.get(name, 1.0)


GGUF = {
    "granite": GGUFArchitecture(
        "granite",
        interleaved=True,
        settings=GGUF_FACTORS,
        constants=GGUF_CONSTANTS,
        required=("logit_scale",),
        finish=fill_in_factors,
    )
}


class ScaledLayer(DecoderLayer):
    """x + r · attention(norm(x)), then x + r · mlp(norm(x)); the sums travel along as `residual`."""

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, norm: type[RMSNorm] = RMSNorm
    ) -> None:
        super().__init__(config, self_attn, mlp, norm)
        self.factor = config.number("residual_multiplier")

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer.  positions: [T]; hidden, residual: [T, H].  Returns its output and the sum before it."""
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden, taker=self.self_attn)
        else:
            hidden, residual = self.input_layernorm(hidden, residual, self.self_attn)
        hidden = self.self_attn(positions, hidden) * self.factor
        hidden, residual = self.post_attention_layernorm(hidden, residual, self.mlp)
        output = self.mlp(hidden)
        # Experts also give their router's logits.
        return (output[0] if isinstance(output, tuple) else output) * self.factor, residual


class Model(llama.Model):
    """GraniteForCausalLM."""

    layer = ScaledLayer

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        self.embedding_scale = config.number("embedding_multiplier")
        super().__init__(config, quant_config)

    def attention_options(self) -> dict[str, Any]:
        return {**super().attention_options(), "scale": self.config.number("attention_multiplier")}

    def compute_logits(self, hidden: Tensor, gather_all: bool = True) -> Tensor | None:
        """Apply the head.  hidden: [N, H].  Returns float32 logits [N, V]; None on ranks that do not get them."""
        logits = super().compute_logits(hidden, gather_all)
        return None if logits is None else logits / self.config.number("logits_scaling")
