"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from pymllm.models import llama

DEFAULTS = {
    **llama.DEFAULTS,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "num_key_value_heads": 8,
}


class Model(llama.Model):
    """MistralForCausalLM."""
