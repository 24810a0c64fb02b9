"""GLM-4 (of 2025): Llama with norms after attention and MLP too, and half of each head rotated, in adjacent pairs."""

# T tokens, H hidden size, D head size, R rotary size (the part of a head that is rotated)

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pymllm.attention.self_attention import SelfAttention
from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.models import llama
from pymllm.models.causal_lm import DecoderLayer
from pymllm.weights.gguf_architecture import LAYER_MODULES, GGUFArchitecture

DEFAULTS = {
    **llama.DEFAULTS,
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "num_key_value_heads": 2,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def rotate_whole_heads(config: dict[str, Any]) -> None:
    """Rotate whole heads where a GGUF file does not say which part."""
    config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)


GGUF = {
    "glm4": GGUFArchitecture(
        "glm4",
        {name: to for name, to in LAYER_MODULES.items() if name != "ffn_gate"}
        | {
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        finish=rotate_whole_heads,
    )
}


class PairedAttention(SelfAttention):
    """Self-attention whose rotary pairs lie side by side in a head, not half of the rotated part apart."""

    def before_rotary(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the heads of q and k as `rotary` takes them; their products do not depend on the order.

        q, k, v: [T, this rank's features of all heads].  Returns the same shapes.
        """
        return self._sorted(q), self._sorted(k), v

    def _sorted(self, x: Tensor) -> Tensor:
        """Put the first elements of all rotary pairs before the second ones.  x: [T, heads · D]."""
        heads = x.unflatten(-1, (-1, self.head_dim))
        rotated, rest = heads.split([self.rotary.rotary_dim, self.head_dim - self.rotary.rotary_dim], dim=-1)
        return torch.cat((rotated[..., 0::2], rotated[..., 1::2], rest), dim=-1).flatten(-2)


class PostNormsLayer(DecoderLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); post_attention_layernorm is the MLP's own."""

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, norm: type[RMSNorm] = RMSNorm
    ) -> None:
        super().__init__(config, self_attn, mlp, norm)
        self.post_self_attn_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)
        self.post_mlp_layernorm = norm(config.size("hidden_size"), config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layer.  positions: [T]; hidden, residual: [T, H].  Returns its output and the sum before it."""
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden, taker=self.self_attn)
        else:
            hidden, residual = self.input_layernorm(hidden, residual, self.self_attn)
        hidden = self.post_self_attn_layernorm(self.self_attn(positions, hidden))
        hidden, residual = self.post_attention_layernorm(hidden, residual, self.mlp)
        return self.post_mlp_layernorm(self.mlp(hidden)), residual


class Model(llama.Model):
    """Glm4ForCausalLM."""

    layer = PostNormsLayer
    attention = PairedAttention

    def attention_options(self) -> dict[str, Any]:
        return {"qkv_bias": self.config.attention_bias}

    def mlp_options(self) -> dict[str, Any]:
        return {"activation": self.config.hidden_act, "part_names": ("gate_up_proj",)}
