"""Gemma: Llama with scaled embeddings, norms that multiply by 1 + their weight, and a GELU-gated MLP."""

from __future__ import annotations

from typing import Any, ClassVar

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError
from pymllm.layers.layernorm import GemmaRMSNorm
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import GGUFArchitecture

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}
GGUF = {"gemma": GGUFArchitecture("gemma", norms_raised_by=1.0)}


class Model(CausalLM):
    """GemmaForCausalLM.  both_ways: whether the family has encoders, whose tokens see those after them."""

    norm = GemmaRMSNorm
    both_ways: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, quant_config: QuantizationConfig | None = None) -> None:
        if config.use_bidirectional_attention and not self.both_ways:
            raise ConfigError(
                "this model attends to later tokens too, which this family does not have here",
                code="config-value",
                file="config.json",
                tensor="use_bidirectional_attention",
                expected="false",
                found=repr(config.use_bidirectional_attention),
            )
        self.embedding_scale = config.size("hidden_size") ** 0.5
        super().__init__(config, quant_config)

    def mlp_options(self) -> dict[str, Any]:
        # "gelu" is what early files have for the tanh approximation.
        given = self.config.hidden_act
        return {"activation": "gelu_pytorch_tanh" if given == "gelu" else given}
