"""Model definitions: one file a family, named by Hugging Face's `model_type`, without any loading code.

A name of Python's has no "-": xlm-roberta is xlm_roberta.py.

A file defines `Model`, which is built from a `ModelConfig`; `DEFAULTS`, the settings that a config.json may leave out;
where GGUF files of the family are read, `GGUF`: what they call its modules, by `general.architecture`; and where its
checkpoints have names for tensors that the model does not have, `RENAMED`: patterns and their replacements. Where the
config.json is that of a wrapper, which has the language model's inside, the file says `WRAPPER = True`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pymllm.config import ModelConfig, with_text_config
from pymllm.errors import CheckpointError, unknown_name
from pymllm.models.causal_lm import CausalLM
from pymllm.models.generic.classes import GenericConfig, read_generic_config
from pymllm.models.generic.model import GenericModel
from pymllm.models.generic.names import rename
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.tensor_file import TensorInfo

# Decoders that were saved without their head (Qwen3Model) have names without the `model.` of those with one.
BODY, BODY_RENAMED = re.compile(r"model\."), {r"((?:embed_tokens|layers|norm)\..*)": r"model.\1"}
# Modules here that are no family.
SHARED = ("causal_lm", "encoder", "generic", "language_model")

# Whose modules run a model type: ours where there is a page, or transformers' in any case.
DEFINITIONS = ("auto", "transformers")


def list_model_types() -> list[str]:
    """List the model types that have a definition."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def read_model_config(raw: Mapping[str, Any], definition: str = "auto") -> ModelConfig:
    """Read a config.json with its family's defaults, or as transformers reads it.

    definition: "auto" prefers a page here, "transformers" does without.
    ConfigError for a model type that has no definition, or for another word than these.
    """
    if definition not in DEFINITIONS:
        raise unknown_name("definition", definition, DEFINITIONS, code="definition")
    found = find_definition(raw) if definition == "auto" else None
    if found is None:
        return read_generic_config(raw)
    page = _definition(found)
    wrapper = vars(page).get("WRAPPER", False)
    return ModelConfig(with_text_config(raw) if wrapper else raw, page.DEFAULTS)


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


def rename_tensors(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Give the checkpoint's tensors the names that their family's definition has for them.

    Returns True for a decoder that was saved without its head, as its names said.
    CheckpointError where two tensors would have one name.
    """
    if isinstance(config, GenericConfig):
        checkpoint.tensors = rename(config.skeleton, checkpoint.tensors)
        return False
    family = _family(checkpoint.config)
    patterns = dict(vars(family).get("RENAMED", {}))
    bare = issubclass(family.Model, CausalLM) and not any(map(BODY.match, checkpoint.tensors))
    if bare:
        patterns |= BODY_RENAMED
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
    return bare


def find_definition(raw: Mapping[str, Any]) -> str | None:
    """Find the definition that runs a config.json: its `model_type`, else that of its only known architecture.

    A vendor may give a model a type of its own whose class is another family's (Kimi-K2: DeepseekV3ForCausalLM).
    Returns the definition's model type, or None.
    """
    known, named_type = list_model_types(), file_name(str(raw.get("model_type")))
    if named_type in known:
        # An encoder's layers may have been trained as a decoder's (BertLMHeadModel).
        decodes = raw.get("is_decoder") is True and not issubclass(_definition(named_type).Model, CausalLM)
        return None if decodes else named_type
    architectures = raw.get("architectures")
    decoders = (name for name in known if issubclass(_definition(name).Model, CausalLM))
    classes = {_class_name(model_type): model_type for model_type in decoders}
    named = (
        [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    )
    if len(named) != 1 or named[0] not in classes:
        return None
    # A checkpoint that brings code along may call any class so, unless it names that class for its model, too.
    brought = raw.get("auto_map")
    own = brought.get("AutoModelForCausalLM") if isinstance(brought, Mapping) else None
    return classes[named[0]] if own is None or str(own).rpartition(".")[2] == named[0] else None


def file_name(model_type: str) -> str:
    """Return the name of the file that a model type's definition would have: xlm-roberta -> xlm_roberta."""
    return model_type.replace("-", "_")


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
