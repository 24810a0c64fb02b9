"""OLMo 2: norms after attention and MLP instead of before them, and over all heads of q and of k."""

# T tokens, H hidden size

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pymllm.attention.self_attention import WholeNormAttention
from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.models.causal_lm import DecoderLayer
from pymllm.weights.gguf_architecture import LAYER_MODULES, GGUFArchitecture

DEFAULTS = {**llama.DEFAULTS, "rms_norm_eps": 1e-5}
NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
GGUF = {
    "olmo2": GGUFArchitecture(
        "olmo2",
        {name: to for name, to in LAYER_MODULES.items() if "layernorm" not in to} | NORMS,
        sliding=4,  # OLMo 3, whose files have this architecture, too
        sliding_scaled=False,
    )
}


class PostNormLayer(DecoderLayer):
    """x + norm(attention(x)), then x + norm(mlp(x)); the sums travel along as `residual`."""

    read_by: ClassVar[dict[str, str]] = {}  # attention and MLP read the sums themselves

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, norm: type[RMSNorm] = RMSNorm
    ) -> None:
        nn.Module.__init__(self)
        self.self_attn, self.mlp = self_attn, mlp
        self.post_attention_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)
        self.post_feedforward_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer.  positions: [T]; hidden, residual: [T, H].  Returns its output and the sum before it."""
        x = hidden if residual is None else hidden + residual
        x = x + self.post_attention_layernorm(self.self_attn(positions, x))
        return self.post_feedforward_layernorm(self.mlp(x)), x


class Model(llama.Model):
    """Olmo2ForCausalLM."""

    layer = PostNormLayer
    attention = WholeNormAttention
