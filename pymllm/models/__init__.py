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
from typing import Any

from pymllm.config import ModelConfig
from pymllm.models.generic.classes import GenericConfig, read_generic_config
from pymllm.models.generic.converted import ConvertedTensor
from pymllm.models.generic.model import GenericModel
from pymllm.models.generic.names import add_once, rename
from pymllm.models.generic.wrappers import Wrapper, read_wrapper
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.tensor_file import TensorInfo

# Modules here that are no family.
SHARED = ("causal_lm", "further_tokens", "generic", "language_model")


def list_model_types() -> list[str]:
    """List the model types that have a definition."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a config.json with its family's defaults, or as transformers reads it.

    ConfigError for a model type that has no definition.
    """
    wrapper = (
        None
        if "text_config" not in raw and raw.get("model_type") in list_model_types()
        else read_wrapper(raw)
    )
    found = find_definition(raw if wrapper is None else wrapper.raw)
    if found is not None and not (isinstance(wrapper, Wrapper) and not wrapper.has_own_logits):
        config = ModelConfig(raw if wrapper is None else wrapper.raw, _definition(found).DEFAULTS)
    elif isinstance(wrapper, Wrapper):
        config = wrapper.generic_config()
    else:
        config = read_generic_config(raw if wrapper is None else wrapper.raw)
    config.wrapper = wrapper
    return config


def build_model(config: ModelConfig, quant_config: QuantizationConfig | None = None) -> LanguageModel:
    """Build the model's modules, their weights on the current default device (usually meta)."""
    if isinstance(config, GenericConfig):
        return GenericModel(config, quant_config)
    return _family(config.raw).Model(config, quant_config)


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """Collect what the definitions say of GGUF files, by `general.architecture`."""
    found: dict[str, GGUFArchitecture] = {}
    for model_type in list_model_types():
        found |= vars(_definition(model_type)).get("GGUF", {})
    return found


def rename_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Give the checkpoint's tensors the names that their family's definition has for them.

    CheckpointError where two tensors would have one name.
    """
    stored = {(info.file, info.start, info.end): name for name, info in checkpoint.tensors.items()}
    if config.wrapper is not None:
        checkpoint.tensors = config.wrapper.rename(checkpoint.tensors, config)
    elif isinstance(config, GenericConfig):
        checkpoint.tensors = rename(config.skeleton, checkpoint.tensors)
    if not isinstance(config, GenericConfig):
        patterns = vars(_family(config.raw)).get("RENAMED", {})
        renamed: dict[str, TensorInfo] = {}
        for found, info in checkpoint.tensors.items():
            name = found
            for pattern, replacement in patterns.items():
                name = re.sub(f"^{pattern}$", replacement, name)
            add_once(renamed, name, info)
        checkpoint.tensors = renamed
    pairs, parts = [], []
    for name, info in checkpoint.tensors.items():
        if isinstance(info, ConvertedTensor):
            parts += [(name, source.name) for source in info.sources]
            pairs += [(source.name, source.name) for source in info.sources]
        else:
            pairs.append((name, stored[info.file, info.start, info.end]))
    checkpoint.stored_as = ModuleNames(pairs)
    full = {} if config.wrapper is None else config.wrapper.full
    checkpoint.names = ModuleNames((*pairs, *parts, *full.items()))


def find_definition(raw: Mapping[str, Any]) -> str | None:
    """Find the definition that runs a config.json: its `model_type`, else that of its only known architecture.

    A vendor may give a model a type of its own whose class is another family's (Kimi-K2: DeepseekV3ForCausalLM).
    Returns the definition's model type, or None.
    """
    known = list_model_types()
    if raw.get("model_type") in known:
        return str(raw["model_type"])
    architectures = raw.get("architectures")
    classes = {_class_name(model_type): model_type for model_type in known}
    named = (
        [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    )
    if len(named) != 1 or named[0] not in classes:
        return None
    # A checkpoint that brings code along may call any class so, unless it names that class for its model, too.
    brought = raw.get("auto_map")
    own = brought.get("AutoModelForCausalLM") if isinstance(brought, Mapping) else None
    return classes[named[0]] if own is None or str(own).rpartition(".")[2] == named[0] else None


def _class_name(model_type: str) -> str:
    """Return the name of transformers' class for a model type: deepseek_v3 -> DeepseekV3ForCausalLM."""
    words = model_type.removesuffix("_text").split("_")
    return "".join(word[:1].upper() + word[1:] for word in words) + "ForCausalLM"


def _family(raw: Mapping[str, Any]) -> Any:
    found = find_definition(raw)
    assert found is not None
    return _definition(found)


def _definition(model_type: str) -> Any:
    return importlib.import_module(f"{__name__}.{model_type}")
