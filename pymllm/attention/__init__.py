"""Attention: its layer and blocks, and the step's metadata that they read."""

from pymllm.attention.attention import Attention, bytes_per_token, reference_torch_attention
from pymllm.attention.triton import triton_attention, triton_grouped_attention
from pymllm.layers.step import (
    AttnMetaDataBase,
    fetch_attn_metadata,
    is_warming_up,
    reset_warming_up,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)

__all__ = [
    "Attention",
    "AttnMetaDataBase",
    "bytes_per_token",
    "fetch_attn_metadata",
    "is_warming_up",
    "reference_torch_attention",
    "reset_warming_up",
    "set_fetch_fn_for_attn_metadata",
    "set_warming_up",
    "triton_attention",
    "triton_grouped_attention",
]
