"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from pymllm.models import llama
from pymllm.weights.gguf_architecture import GGUFArchitecture

DEFAULTS = {
    **llama.DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GGUF = {"qwen2": GGUFArchitecture("qwen2", sliding=0)}


class Model(llama.Model):
    """Qwen2ForCausalLM."""

    def attention_options(self) -> dict[str, Any]:
        return {"qkv_bias": True}
