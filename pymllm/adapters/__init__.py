"""LoRA adapters as PEFT writes them: readers of their settings, and the loading onto a model's layers."""

from pymllm.adapters.config import LoRAConfig, load_lora_config
from pymllm.adapters.loading import (
    LoadedAdapter,
    enable_lora_for_model,
    load_lora_weights,
    loaded_adapters,
    merge_lora_weights,
    unload_lora_weights,
    unmerge_lora_weights,
)

__all__ = [
    "LoRAConfig",
    "LoadedAdapter",
    "enable_lora_for_model",
    "load_lora_config",
    "load_lora_weights",
    "loaded_adapters",
    "merge_lora_weights",
    "unload_lora_weights",
    "unmerge_lora_weights",
]
