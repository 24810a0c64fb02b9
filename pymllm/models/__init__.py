"""Model definitions: one file a family, named by Hugging Face's `model_type`, without any loading code.

A file defines `Model`, which is built from a `ModelConfig`; `DEFAULTS`, the settings that a config.json may leave out;
where GGUF files of the family are read, `GGUF`: what they call its modules, by `general.architecture`; and where its
checkpoints have names for tensors that the model does not have, `RENAMED`: patterns and their replacements.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pymllm.config import ModelConfig
from pymllm.errors import CheckpointError, ConfigError, nearest
from pymllm.models.causal_lm import CausalLM
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.tensor_file import TensorInfo

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


def rename_tensors(checkpoint: Checkpoint) -> None:
    """Give the checkpoint's tensors the names that their family's definition has for them.

    CheckpointError where two tensors would have one name.
    """
    patterns = vars(_family(checkpoint.config.get("model_type"))).get("RENAMED", {})
    renamed: dict[str, TensorInfo] = {}
    for stored, info in checkpoint.tensors.items():
        name = stored
        for pattern, replacement in patterns.items():
            name = re.sub(f"^{pattern}$", replacement, name)
        if name in renamed:
            raise CheckpointError(
                f"two tensors of the checkpoint are the model's {name!r}",
                code="duplicate-tensor",
                file=str(info.file.path),
                tensor=stored,
                fix="The checkpoint is badly written: convert or download it again.",
            )
        renamed[name] = info if name == stored else replace(info, name=name)
    checkpoint.tensors = renamed


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
