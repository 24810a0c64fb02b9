"""What sentence-transformers' folders say of a text's vector.

    modules.json                       the modules in order: Transformer, Pooling, Dense, Normalize
    1_Pooling/config.json              how the hidden states of a text's tokens become one vector
    2_Dense/config.json, .safetensors  a projection of that vector
    sentence_bert_config.json          max_seq_length, do_lower_case
    config_sentence_transformers.json  prompts, which are put before a text

A module that is none of these is refused by its name.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.errors import CheckpointError, ConfigError, choices, nearest
from pymllm.weights.folder import MODULES, module_path
from pymllm.weights.json_text import parse_json, read_json_object
from pymllm.weights.tensor_file import read_small_file

# In the order in which the vectors of several modes are put side by side.
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ALIASES = {"mean_sqrt_len": "mean_sqrt_len_tokens", "last": "lasttoken"}
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
PROMPTS = "config_sentence_transformers.json"
NO_PROMPTS = {"query": "", "document": ""}  # names that every model has, and that may ask for nothing
TOKENS, VECTOR = "token_embeddings", "sentence_embedding"
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
# Settings of the Transformer that change the model or the tokenizer, and those of them that change no vector.
ARGUMENTS = ("config_kwargs", "config_args", "processor_kwargs", "tokenizer_args")
NEUTRAL_ARGUMENTS = {
    "attn_implementation",
    "cache_dir",
    "local_files_only",
    "padding_side",
    "revision",
    "token",
    "trust_remote_code",
    "use_cache",
    "use_fast",
}
MAX_BYTES = 16 << 20  # of a settings file
# Settings of modules that name what they read and write, with the only values that there are here.
VALUE_NAMES = {"module_input_name": VECTOR, "module_output_name": VECTOR}


@dataclass(frozen=True)
class Pooling:
    """The step from the hidden states of a text's tokens to one vector.

    modes: of `MODES`; the vectors of several are put side by side.  include_prompt: whether a prompt's tokens count.
    """

    modes: tuple[str, ...]
    include_prompt: bool = True

    def __str__(self) -> str:
        return " and ".join(self.modes) + " pooling" + ("" if self.include_prompt else " without the prompt")


@dataclass(frozen=True)
class Dense:
    """A projection of the vector: activation(W x + b), plus x or its own projection where `residual` is set.

    folder: where its tensors are.  activation: a name of `ACTIVATIONS`.
    """

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str
    residual: bool

    def __str__(self) -> str:
        return f"a projection from {self.inputs} to {self.outputs}"


@dataclass(frozen=True)
class Normalize:
    """The division of the vector by its length."""

    def __str__(self) -> str:
        return "normalisation"


Module = Pooling | Dense | Normalize


@dataclass(frozen=True)
class EmbeddingSettings:
    """The settings that a folder has.

    modules: behind the transformer; without a `Pooling`, the folder does not say how a text becomes a vector.
    max_length: of tokens of a text, the special ones included.  prompts: by name.  default_prompt: the name of one, or
    None.  lower_case: whether texts are put in lower case first.
    """

    modules: tuple[Module, ...] = ()
    max_length: int = 0
    prompts: Mapping[str, str] = field(default_factory=lambda: NO_PROMPTS)
    default_prompt: str | None = None
    lower_case: bool = False

    def __str__(self) -> str:
        return ", ".join(map(str, self.modules))


@names_files
def read_settings(path: Path, longest: int) -> EmbeddingSettings:
    """Read what the folder of a checkpoint, or the one around it, says of embeddings.

    path: the checkpoint's.  longest: the most tokens that the model knows positions for.
    A checkpoint without modules.json has no modules.
    Raises CheckpointError for files that cannot be read, ConfigError for modules and settings that pymllm has not.
    """
    tokenizer = _read_object(path / "tokenizer_config.json") if path.is_dir() else {}
    given, most = tokenizer.get("model_max_length"), longest
    if isinstance(given, (int, float)) and not isinstance(given, bool) and given >= 1:
        most = int(min(longest, given))
    folder = find_folder(path)
    if folder is None:
        return EmbeddingSettings(max_length=most)
    entries = read_modules(folder / MODULES)
    kinds = [_kind(entry, folder) for entry in entries]
    if not kinds or kinds[0] != "Transformer" or kinds.count("Transformer") != 1:
        raise _refused(folder / MODULES, "the first module must be the only Transformer", " and ".join(kinds))
    transformer = _read_transformer(path, folder)
    limit = transformer.get("max_seq_length")
    if limit is not None:
        most = min(longest, _size(path / TRANSFORMER_CONFIGS[0], "max_seq_length", limit))
    modules = []
    for entry, kind in zip(entries[1:], kinds[1:], strict=True):
        module = READERS[kind](folder / module_path(entry.get("path", ""), folder / MODULES))
        modules += [] if module is None else [module]
    pooled = [isinstance(module, Pooling) for module in modules]
    if any(pooled[1:]) or (modules and not pooled[0]):
        found = " and ".join(kinds)
        raise _refused(
            folder / MODULES, "one Pooling must come behind the Transformer, before all else", found
        )
    prompts, default = _read_prompts(folder / PROMPTS)
    return EmbeddingSettings(tuple(modules), most, prompts, default, bool(transformer.get("do_lower_case")))


@names_files
def find_folder(path: Path) -> Path | None:
    """Find the folder with modules.json: the checkpoint's own, or the one around it; None: there is none."""
    if os.path.lexists(path / MODULES):
        return path
    around = path.parent / MODULES
    if path.is_dir() and os.path.lexists(around):
        inside = [module_path(entry.get("path", ""), around) for entry in read_modules(around)]
        if path.name in inside[:1]:
            return path.parent
    return None


def read_modes(pooling: str | Sequence[str]) -> tuple[str, ...]:
    """Read the names of pooling modes that a user gives.  ConfigError for an unknown one."""
    names = (
        (pooling,) if isinstance(pooling, str) else tuple(pooling) if isinstance(pooling, Iterable) else ()
    )
    modes = tuple(ALIASES.get(name, name) if isinstance(name, str) else name for name in names)
    wrong = next((name for name in modes if name not in MODES), None)
    if wrong is not None or not modes:
        raise ConfigError(
            f"there is no pooling {reprlib.repr(wrong)}",
            code="pooling",
            expected=choices(MODES, wrong),
            found=reprlib.repr(pooling),
            fix=nearest(str(wrong), MODES),
        )
    return modes


@names_files
def read_modules(file: Path) -> list[dict[str, Any]]:
    """Read modules.json, a list of one object for each module.  CheckpointError or ConfigError for anything else."""
    entries = parse_json(read_small_file(file, MAX_BYTES, "embedding"), file, "embedding")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise _refused(file, "the file must be a list of modules", reprlib.repr(entries))
    return entries


def _kind(entry: Mapping[str, Any], folder: Path) -> str:
    """Return the class of a module: the last word of its type, which must be sentence-transformers' own."""
    full = str(entry.get("type"))
    kind = full.rpartition(".")[2]
    if not full.startswith("sentence_transformers.") or kind not in ("Transformer", *READERS):
        raise ConfigError(
            f"embeddings of this model need the module {full!r}, which pymllm does not have",
            code="embedding-module",
            file=str(folder / MODULES),
            expected=choices(("Transformer", *READERS), kind),
            found=full,
            fix="Code that a checkpoint brings along is never run.",
        )
    return kind


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no file."""
    if not os.path.lexists(file):
        return {}
    return read_json_object(file, MAX_BYTES, "embedding", allow_non_finite=True)


def _read_transformer(path: Path, folder: Path) -> dict[str, Any]:
    """Read the settings of the Transformer, and refuse those that would give other hidden states."""
    files = (place / name for name in TRANSFORMER_CONFIGS for place in (path, folder))
    file = next((file for file in files if os.path.lexists(file)), None)
    settings = {} if file is None else _read_object(file)
    neutral: dict[str, tuple[Any, ...]] = {
        "transformer_task": ("feature-extraction",),
        "module_output_name": (TOKENS,),
        "processing_kwargs": ({},),
    }
    for name, values in neutral.items():
        if settings.get(name) is not None and settings[name] not in values:
            raise _setting(file or folder, name, settings[name], " or ".join(map(repr, values)))
    for name in ARGUMENTS:
        given = settings.get(name) or {}
        if not isinstance(given, Mapping) or given.keys() - NEUTRAL_ARGUMENTS:
            raise _setting(file or folder, name, given, f"at most {', '.join(sorted(NEUTRAL_ARGUMENTS))}")
    _switch(file or folder, "do_lower_case", settings)
    ways = settings.get("modality_config") or {}
    text = ways.get("text", {}) if isinstance(ways, Mapping) else ways
    expected = {"method": "forward", "method_output_name": "last_hidden_state"}
    if not isinstance(text, Mapping) or any(text.get(key, to) != to for key, to in expected.items()):
        raise _setting(file or folder, "modality_config", ways, f"text with {expected}")
    return settings


def _read_pooling(folder: Path) -> Pooling:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            "modules.json names a Pooling whose settings are missing",
            code="embedding-missing",
            file=str(file),
            fix="Download the whole model again, with its folders.",
        )
    settings = _read_object(file)
    given = settings.get("pooling_mode")
    if given is None:
        known = {"word_embedding_dimension", "embedding_dimension", "include_prompt", *SWITCHES}
        unknown = [name for name, value in settings.items() if name not in known and value]
        if unknown:
            raise _setting(file, unknown[0], settings[unknown[0]], " or ".join(SWITCHES))
        given = [mode for name, mode in SWITCHES.items() if _switch(file, name, settings)] or ["mean"]
    try:
        modes = read_modes(given)
    except ConfigError:
        raise _setting(file, "pooling_mode", given, " or ".join(MODES)) from None
    return Pooling(modes, _switch(file, "include_prompt", settings, True))


def _read_dense(folder: Path) -> Dense:
    file = folder / "config.json"
    settings = _read_object(file)
    _refuse_names(file, settings)
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    name = activation.rpartition(".")[2]
    if not activation.startswith("torch.nn.") or name not in ACTIVATIONS:
        expected = " or ".join(f"torch.nn's {known}" for known in ACTIVATIONS)
        raise _setting(file, "activation_function", activation, expected)
    bias, residual = _switch(file, "bias", settings, True), _switch(file, "use_residual", settings)
    inputs, outputs = (_size(file, key, settings.get(key)) for key in ("in_features", "out_features"))
    return Dense(folder, inputs, outputs, bias, name, residual)


def _read_normalize(folder: Path) -> Normalize:
    _refuse_names(folder / "config.json", _read_object(folder / "config.json"))
    return Normalize()


def _read_dropout(folder: Path) -> None:
    """Read nothing: a dropout changes vectors while training alone."""


READERS: dict[str, Callable[[Path], Module | None]] = {
    "Pooling": _read_pooling,
    "Dense": _read_dense,
    "Normalize": _read_normalize,
    "Dropout": _read_dropout,
}


def _read_prompts(file: Path) -> tuple[dict[str, str], str | None]:
    settings = _read_object(file)
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    fine = isinstance(prompts, dict) and all(isinstance(text, (str, type(None))) for text in prompts.values())
    if not fine:
        raise _setting(file, "prompts", prompts, "texts by name")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise _setting(
            file, "default_prompt_name", default, " or ".join(prompts) or "null, as there are no prompts"
        )
    return NO_PROMPTS | {name: text or "" for name, text in prompts.items()}, default


def _refuse_names(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a module that reads or writes anything but the text's vector."""
    for name, only in VALUE_NAMES.items():
        if settings.get(name) not in (None, only):
            raise _setting(file, name, settings[name], repr(only))


def _switch(file: Path, name: str, settings: Mapping[str, Any], default: bool = False) -> bool:
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise _setting(file, name, value, "true or false")
    return default if value is None else value


def _size(file: Path, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _setting(file, name, value, "an integer of at least 1")
    return value


def _setting(file: Path, name: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{name} has a value that pymllm does not compute with",
        code="embedding-setting",
        file=str(file),
        tensor=name,
        expected=expected,
        found=reprlib.repr(found),
    )


def _refused(file: Path, message: str, found: str) -> ConfigError:
    return ConfigError(message, code="embedding-modules", file=str(file), found=found)
