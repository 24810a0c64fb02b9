"""Model definitions: one file a family, named by Hugging Face's `model_type`, without any loading code.

A file defines `Model`, which is built from a `ModelConfig`; `DEFAULTS`, the settings that a config.json may leave out;
and, where GGUF files of the family are read, `GGUF`: what they call its modules, by `general.architecture`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from pymllm.config import ModelConfig
from pymllm.errors import ConfigError, nearest
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.gguf_architecture import GGUFArchitecture

# Modules here that are no family.
SHARED = ("causal_lm",)


def list_model_types() -> list[str]:
    """List the model types that have a definition."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json with its family's defaults.  ConfigError for a model type that has no definition here."""
    return ModelConfig(raw, _family(raw.get("model_type")).DEFAULTS)


def build_model(config: ModelConfig, quant_config: QuantizationConfig | None = None) -> CausalLM:
    """Build the model's modules, their weights on the current default device (usually meta)."""
    return _family(config.raw.get("model_type")).Model(config, quant_config)


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """Collect what the definitions say of GGUF files, by `general.architecture`."""
    found: dict[str, GGUFArchitecture] = {}
    for model_type in list_model_types():
        found |= vars(_family(model_type)).get("GGUF", {})
    return found


def _family(model_type: Any) -> Any:
    known = list_model_types()
    if model_type not in known:
        raise ConfigError(
            f"there is no definition for the model type {model_type!r}",
            code="model-type",
            file="config.json",
            tensor="model_type",
            expected=" or ".join(known),
            found=repr(model_type),
            fix=nearest(str(model_type), known) or "Code that a checkpoint brings along is never run.",
        )
    return importlib.import_module(f"{__name__}.{model_type}")
