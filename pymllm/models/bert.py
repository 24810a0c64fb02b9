"""BERT: learned positions, norms after each sum, an MLP without a gate; every token sees all others."""

# T tokens, H hidden size

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from pymllm.config import ModelConfig, current_execution
from pymllm.layers.embedding import VocabParallelEmbedding
from pymllm.layers.layernorm import LayerNorm
from pymllm.layers.linear import ColumnParallelLinear, RowParallelLinear
from pymllm.models.encoder import (
    MASKED_HEAD,
    POOLER,
    Encoder,
    EncoderAttention,
    activation_of,
    refuse_other_positions,
    refuse_other_types,
    refuse_settings,
)
from pymllm.quantization.base import QuantizationConfig, StoredTensor
from pymllm.weights.report import Skip

DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
# Classes with a head have the encoder in `bert`; the first conversions call a norm's weight gamma, and its bias beta.
RENAMED = {
    r"(?:bert\.)?(.*LayerNorm)\.gamma": r"\1.weight",
    r"(?:bert\.)?(.*LayerNorm)\.beta": r"\1.bias",
    r"bert\.(.*)": r"\1",
}


class Embeddings(nn.Module):
    """The norm of the sum of a token's, its position's and its type's embedding; every token of a text has type 0."""

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        hidden, execution = config.size("hidden_size"), current_execution()
        dtype = None if execution is None else execution.dtype
        self.word_embeddings = VocabParallelEmbedding(
            config.size("vocab_size"),
            hidden,
            prefix="embeddings.word_embeddings",
            quant_config=quant_config,
        )
        self.position_embeddings = nn.Embedding(config.size("max_position_embeddings"), hidden, dtype=dtype)
        self.token_type_embeddings = nn.Embedding(config.size("type_vocab_size"), hidden, dtype=dtype)
        self.LayerNorm = LayerNorm(hidden, config.number("layer_norm_eps"))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Embed tokens.  ids, positions: [T], the latter as rows of the table.  Returns [T, H]."""
        # In transformers' order, as sums of floats depend on it.
        words = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(words + self.position_embeddings(positions))


class Output(nn.Module):
    """A projection, added to what the block began with, and the norm of the sum."""

    def __init__(
        self, config: ModelConfig, inputs: int, prefix: str, quant_config: QuantizationConfig | None
    ) -> None:
        super().__init__()
        hidden = config.size("hidden_size")
        self.dense = RowParallelLinear(
            inputs, hidden, True, prefix=f"{prefix}.dense", quant_config=quant_config
        )
        self.LayerNorm = LayerNorm(hidden, config.number("layer_norm_eps"))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Compute norm(dense(x) + residual).  x: [T, this rank's inputs]; residual: [T, H].  Returns [T, H]."""
        return self.LayerNorm(self.dense(x) + residual)


class AttentionBlock(nn.Module):
    """Attention, its output projection, and the norm of the sum."""

    def __init__(self, config: ModelConfig, prefix: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(
            config,
            prefix=f"{prefix}.self",
            quant_config=quant_config,
            part_names=("query", "key", "value"),
            bias=True,
        )
        self.output = Output(config, config.size("hidden_size"), f"{prefix}.output", quant_config)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Compute norm(hidden + attention(hidden)).  positions: [T]; hidden: [T, H].  Returns [T, H]."""
        return self.output(self.self_attn(positions, hidden), hidden)


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: ModelConfig, prefix: str, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        inner = config.size("intermediate_size")
        self.attention = AttentionBlock(config, f"{prefix}.attention", quant_config)
        self.intermediate = ColumnParallelLinear(
            config.size("hidden_size"),
            inner,
            True,
            False,
            prefix=f"{prefix}.intermediate.dense",
            quant_config=quant_config,
        )
        self.activation = activation_of(config, "hidden_act")
        self.output = Output(config, inner, f"{prefix}.output", quant_config)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run the layer.  positions: [T]; hidden: [T, H].  Returns [T, H]."""
        hidden = self.attention(positions, hidden)
        return self.output(self.activation(self.intermediate(hidden)), hidden)


class Layers(nn.Module):
    """All layers, under the name that checkpoints have for their list."""

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        count = config.size("num_hidden_layers")
        self.layer = nn.ModuleList(Layer(config, f"encoder.layer.{i}", quant_config) for i in range(count))

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Run every layer.  positions: [T]; hidden: [T, H].  Returns [T, H]."""
        for layer in self.layer:
            hidden = layer(positions, hidden)
        return hidden


class Model(Encoder):
    """BertModel, without its pooler."""

    skipped_tensors: ClassVar[dict[str, str]] = {
        r"pooler\.dense\.(weight|bias)": POOLER,
        r"cls\.(predictions|seq_relationship)\..*": MASKED_HEAD,
    }

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        super().__init__(config)
        refuse_settings(
            config, position_embedding_type=["absolute"], is_decoder=[False], add_cross_attention=[False]
        )
        self.embeddings = Embeddings(config, quant_config)
        self.encoder = Layers(config, quant_config)

    def skip_reason(self, tensor: str, stored: Mapping[str, StoredTensor]) -> Skip | str | None:
        if tensor == "embeddings.position_ids":
            return Skip("the positions 0, 1, 2, ..., which follow from the text", refuse_other_positions)
        if tensor == "embeddings.token_type_ids":
            return Skip("the type 0 of every token", refuse_other_types)
        return None

    def table_rows(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the row of the position table for each token.  ids, positions, result: [T]."""
        return positions

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the model.  ids, positions: [T], requests side by side.  Returns hidden states [T, H]."""
        return self.encoder(positions, self.embeddings(ids, self.table_rows(ids, positions)))
