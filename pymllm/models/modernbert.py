"""ModernBERT: rotary positions, norms before each block, a gated MLP, and layers that see their surroundings alone."""

# T tokens, H hidden size

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from pymllm.config import ModelConfig, RopeParameters
from pymllm.errors import ConfigError
from pymllm.layers.embedding import VocabParallelEmbedding
from pymllm.layers.layernorm import LayerNorm
from pymllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from pymllm.layers.rotary_embedding import get_rope
from pymllm.models.encoder import MASKED_HEAD, Encoder, EncoderAttention, activation_of
from pymllm.quantization.base import QuantizationConfig

DEFAULTS = {
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 8192,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
}
# Classes with a head have the encoder in `model`.
RENAMED = {r"model\.(.*)": r"\1"}


def attention_kind(config: ModelConfig, layer: int) -> str:
    """Return "full_attention" or "sliding_attention", which every config said by a period at first."""
    kind = config.attention_kind_of(layer)
    if kind is None:
        full = layer % config.size("global_attn_every_n_layers") == 0
        kind = "full_attention" if full else "sliding_attention"
    return kind


def rope_of(config: ModelConfig, kind: str) -> RopeParameters:
    """Read the rotary settings of a kind of layer: each kind has a base of its own."""
    rope = RopeParameters.read(config, kind)
    if rope.partial_rotary_factor != 1:
        raise ConfigError(
            "config.json turns a part of each head, and this model turns all of it",
            code="config-value",
            file="config.json",
            tensor="partial_rotary_factor",
            expected="1",
            found=repr(rope.partial_rotary_factor),
        )
    name = "global_rope_theta" if kind == "full_attention" else "local_rope_theta"
    return rope if rope.scaling.get("rope_theta") else replace(rope, theta=config.number(name))


class MLP(nn.Module):
    """Wo(act(a) * b), where Wi(x) has a and b side by side."""

    def __init__(self, config: ModelConfig, prefix: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        hidden, inner, bias = config.size("hidden_size"), config.size("intermediate_size"), config.mlp_bias
        self.Wi = MergedColumnParallelLinear(
            hidden,
            [inner, inner],
            bias,
            gather_output=False,
            part_names=("Wi",),
            prefix=f"{prefix}.Wi",
            quant_config=quant_config,
        )
        self.activation = activation_of(config, "hidden_activation")
        self.Wo = RowParallelLinear(inner, hidden, bias, prefix=f"{prefix}.Wo", quant_config=quant_config)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the MLP.  x: [T, H].  Returns [T, H]."""
        a, b = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(self.activation(a) * b)


class SelfAttention(nn.Module):
    """Attention with rotary positions, all of it or a window on either side, and its output projection."""

    def __init__(
        self, config: ModelConfig, layer: int, prefix: str, quant_config: QuantizationConfig | None
    ) -> None:
        super().__init__()
        hidden, kind = config.size("hidden_size"), attention_kind(config, layer)
        head_dim, rope = hidden // config.size("num_attention_heads"), rope_of(config, kind)
        # local_attention counts both sides; a token at its half is still seen.
        window = config.size("local_attention") // 2 + 1
        self.inner = EncoderAttention(
            config,
            prefix=prefix,
            quant_config=quant_config,
            part_names=("Wqkv",),
            bias=config.attention_bias,
            sliding_window=window if kind == "sliding_attention" else None,
            rotary=get_rope(
                head_dim,
                head_dim,
                config.size("max_position_embeddings"),
                rope.theta,
                rope.scaling,
                rope.rope_type,
            ),
        )
        self.Wo = RowParallelLinear(
            hidden, hidden, config.attention_bias, prefix=f"{prefix}.Wo", quant_config=quant_config
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Attend.  positions: [T]; hidden: [T, H].  Returns [T, H]."""
        return self.Wo(self.inner(positions, hidden))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the first layer's input is normed already."""

    def __init__(self, config: ModelConfig, layer: int, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        prefix = f"layers.{layer}"
        norm = partial(
            LayerNorm, config.size("hidden_size"), config.number("norm_eps"), bool(config.norm_bias)
        )
        self.attn_norm = norm() if layer else nn.Identity()
        self.attn = SelfAttention(config, layer, f"{prefix}.attn", quant_config)
        self.mlp_norm = norm()
        self.mlp = MLP(config, f"{prefix}.mlp", quant_config)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run the layer.  positions: [T]; hidden: [T, H].  Returns [T, H]."""
        hidden = hidden + self.attn(positions, self.attn_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Embeddings(nn.Module):
    """The norm of a token's embedding."""

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(
            config.size("vocab_size"),
            config.size("hidden_size"),
            prefix="embeddings.tok_embeddings",
            quant_config=quant_config,
        )
        self.norm = LayerNorm(config.size("hidden_size"), config.number("norm_eps"), bool(config.norm_bias))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed tokens.  ids: [T].  Returns [T, H]."""
        return self.norm(self.tok_embeddings(ids))


class Model(Encoder):
    """ModernBertModel."""

    skipped_tensors: ClassVar[dict[str, str]] = {
        r"head\.(dense|norm)\.(weight|bias)": MASKED_HEAD,
        r"decoder\.(weight|bias)": MASKED_HEAD,
    }

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, quant_config)
        count = config.size("num_hidden_layers")
        self.layers = nn.ModuleList(Layer(config, index, quant_config) for index in range(count))
        self.final_norm = LayerNorm(
            config.size("hidden_size"), config.number("norm_eps"), bool(config.norm_bias)
        )

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the model.  ids, positions: [T], requests side by side.  Returns hidden states [T, H]."""
        hidden = self.embeddings(ids)
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.final_norm(hidden)
