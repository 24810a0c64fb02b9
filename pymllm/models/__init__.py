"""Pages: one file a family, named by Hugging Face's `model_type`, that defines its model, without any loading code.

Of "-" a name of Python's has "_", and no capitals: xlm-roberta is xlm_roberta.py, Fast_dLLM_Qwen fast_dllm_qwen.py.

A file defines `Model`, which is built from a `ModelConfig`; `DEFAULTS`, the settings that a config.json may leave out;
where GGUF files of the family are read, `GGUF`: what they call its modules, by `general.architecture`; where its
checkpoints have names for tensors that the model does not have, `RENAMED`: patterns and their replacements; and where
its class in config.json is not called after the type, `ARCHITECTURE`: that class's name.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

from pymllm.config import ModelConfig, check_values
from pymllm.errors import unknown_name
from pymllm.models.causal_lm import CausalLM
from pymllm.models.generic.classes import GenericConfig, read_generic_config
from pymllm.models.generic.converted import ConvertedTensor
from pymllm.models.generic.model import GenericModel
from pymllm.models.generic.names import add_once, rename, stored_spelling
from pymllm.models.generic.wrappers import Wrapper, read_wrapper
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.tensor_file import TensorInfo

# Decoders that were saved without their head (Qwen3Model) have names without the `model.` of those with one.
BODY, BODY_RENAMED = (
    re.compile(r"model\."),
    {r"((?:embed_tokens|word_embeddings|layers|norm)\..*)": r"model.\1"},
)
# Modules here that are no family.
SHARED = ("causal_lm", "encoder", "further_tokens", "generic", "language_model", "strategy")

# Whose modules run a model type: ours where there is a page, or transformers' in any case.
DEFINITIONS = ("auto", "transformers")


def list_model_types() -> list[str]:
    """List the model types that have a page."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def read_model_config(raw: Mapping[str, Any], definition: str = "auto") -> ModelConfig:
    """Read a config.json with its family's defaults, or as transformers reads it.

    definition: "auto" prefers a page here, "transformers" does without.
    ConfigError for a model type that has neither a page nor a class, or for another word than these.
    """
    if definition not in DEFINITIONS:
        raise unknown_name("definition", definition, DEFINITIONS, code="definition")
    check_values(raw)
    alone = file_name(str(raw.get("model_type"))) in list_model_types() and "text_config" not in raw
    wrapper = None if alone else read_wrapper(raw)
    text = raw if wrapper is None else wrapper.raw
    check_values(text)
    found = find_definition(text) if definition == "auto" else None
    if found is not None and not (isinstance(wrapper, Wrapper) and not wrapper.has_own_logits):
        config = ModelConfig(text, _definition(found).DEFAULTS)
    elif isinstance(wrapper, Wrapper):
        config = wrapper.generic_config()
    else:
        config = read_generic_config(text)
    config.wrapper = wrapper
    return config


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """Return the class of the model that `build_model` builds."""
    if isinstance(config, GenericConfig):
        return GenericModel
    family: type[LanguageModel] = _family(config.raw).Model
    return family


def build_model(config: ModelConfig, quant_config: QuantizationConfig | None = None) -> LanguageModel:
    """Build the model's modules, their weights on the current default device (usually meta)."""
    made: LanguageModel = model_class(config)(config, quant_config)  # type: ignore[call-arg]
    return made


def gguf_architectures() -> dict[str, GGUFArchitecture]:
    """Collect what the pages say of GGUF files, by `general.architecture`."""
    found: dict[str, GGUFArchitecture] = {}
    for model_type in list_model_types():
        found |= vars(_definition(model_type)).get("GGUF", {})
    return found


def rename_tensors(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Give the checkpoint's tensors the names that the model has for them.

    Returns True for a decoder that was saved without its head, as its names said.
    CheckpointError where two tensors would have one name.
    """
    stored = {(info.file, info.start, info.end): name for name, info in checkpoint.tensors.items()}
    if config.wrapper is not None:
        checkpoint.tensors = config.wrapper.rename(checkpoint.tensors, config)
    elif isinstance(config, GenericConfig):
        checkpoint.tensors = rename(config.skeleton, checkpoint.tensors)
    bare = False
    if not isinstance(config, GenericConfig):
        family = _family(config.raw)
        patterns = dict(vars(family).get("RENAMED", {}))
        bare = issubclass(family.Model, CausalLM) and not any(map(BODY.match, checkpoint.tensors))
        if bare:
            patterns |= BODY_RENAMED
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
    if isinstance(config.wrapper, Wrapper):
        checkpoint.stored_as = ModuleNames(pairs, config.wrapper.spelling(config, pairs))
    elif config.wrapper is None and isinstance(config, GenericConfig):
        checkpoint.stored_as = ModuleNames(pairs, stored_spelling(config.skeleton, pairs))
    else:
        checkpoint.stored_as = ModuleNames(pairs)
    full = {} if config.wrapper is None else config.wrapper.full
    checkpoint.names = ModuleNames((*pairs, *parts, *full.items()))
    return bare


def find_definition(raw: Mapping[str, Any]) -> str | None:
    """Find the page that runs a config.json: that of its `model_type`, else that of its only known architecture.

    A vendor may give a model a type of its own whose class is another family's (Kimi-K2: DeepseekV3ForCausalLM).
    Returns the page's model type, or None.
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
    """Return the name of the file that a model type's page would have: xlm-roberta -> xlm_roberta."""
    return model_type.replace("-", "_").lower()


def _class_name(model_type: str) -> str:
    """Return the name that config.json has for a page's class: deepseek_v3 -> DeepseekV3ForCausalLM."""
    given = vars(_definition(model_type)).get("ARCHITECTURE")
    if given is not None:
        return str(given)
    words = model_type.removesuffix("_text").split("_")
    return "".join(word[:1].upper() + word[1:] for word in words) + "ForCausalLM"


def _family(raw: Mapping[str, Any]) -> Any:
    found = find_definition(raw)
    assert found is not None
    return _definition(found)


def _definition(model_type: str) -> Any:
    return importlib.import_module(f"{__name__}.{model_type}")
