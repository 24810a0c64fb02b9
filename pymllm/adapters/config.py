"""An adapter's settings: PEFT's adapter_config.json, read strictly.

A setting that changes how an adapter is applied is either honoured or refused by its name; a setting that only steered
its training is ignored. Names are matched as PEFT does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymllm.disk import names_files
from pymllm.errors import ConfigError
from pymllm.patterns import EXPECTED, Pattern
from pymllm.weights.json_text import parse_json_object
from pymllm.weights.opening import resolve_model_path
from pymllm.weights.tensor_file import read_small_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 16 << 20

HONOURED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "init_lora_weights"),
}
# Settings of training, of the adapter's origin, or of layers that our models do not have (fan_in_fan_out: Conv1D).
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("lora_dropout", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "megatron_config", "megatron_core", "runtime_config"),
}
REFUSED = {
    "use_dora": "DoRA scales the columns of base and adapter together",
    "modules_to_save": "it replaces whole modules, which every request would share",
    "bias": "it replaces the model's biases",
    "lora_bias": "B has a bias",
    "use_qalora": "QALoRA pools inputs by group",
    "use_bdlora": "its matrices are block-diagonal",
    "layer_replication": "it repeats layers of the model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts bare parameters, not layers",
    "alora_invocation_tokens": "it applies from certain tokens on",
    "ensure_weight_tying": "it ties the adapters of embedding and head",
}
# What each of these is without an effect.
ABSENT: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(("modules_to_save", "layer_replication", "trainable_token_indices"), (None, [], {})),
    **dict.fromkeys(("target_parameters", "alora_invocation_tokens"), (None, [])),
}
SWITCHES = ("use_rslora", "fan_in_fan_out", "inference_mode")
# The largest float32, in which a kernel multiplies by it.
MAX_NUMBER = 3.4e38
# The ways to start A and B that leave the base weights as they are; the others (PiSSA, OLoRA, LoftQ, ...) change them.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter that decide how it is applied.

    path: the adapter's folder.  target_modules: a regular expression, "all-linear", or names and their endings.
    exclude_modules: a regular expression, or names and their endings.
    layers_to_transform: the indices of the decoder layers that have the adapter; None: all.  layers_pattern: the names
    of the module lists that these indices count in; empty: any list.
    rank_pattern, alpha_pattern: other ranks and alphas, by the pattern of a layer's name.
    """

    path: Path
    rank: int
    alpha: float
    target_modules: str | tuple[str, ...]
    rank_stabilised: bool = False
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter on this layer."""
        return int(self._by_pattern("rank_pattern", name, self.rank))

    def scaling_of(self, name: str) -> float:
        """Compute alpha / r, or alpha / √r if the adapter is rank-stabilised."""
        rank, alpha = self.rank_of(name), self._by_pattern("alpha_pattern", name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets(self, name: str, kind: str) -> bool:
        """Tell whether the adapter is on this layer.  kind: linear, embedding or lm_head."""
        if self._matches("exclude_modules", self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return kind == "linear"
        return self._matches("target_modules", self.target_modules, name) and self._of_chosen_layer(name)

    def unmatched(self, kinds: Mapping[str, str]) -> list[str]:
        """List the targets that name none of these layers.  kinds: the layers' kinds by name."""
        if self.target_modules == "all-linear":
            return []
        targets = self.target_modules
        wanted = [targets] if isinstance(targets, str) else [(target,) for target in targets]
        return [
            one if isinstance(one, str) else one[0]
            for one in wanted
            if not any(self._matches("target_modules", one, name) for name in kinds)
        ]

    def _compiled(self, pattern: str, setting: str) -> Pattern:
        return _compile(pattern, self.path / CONFIG_FILE, setting)

    def _matches(self, setting: str, wanted: str | tuple[str, ...], name: str) -> bool:
        """Match a name.  wanted: a regular expression for all of it, or names and endings of whole segments."""
        if isinstance(wanted, str):
            return self._compiled(wanted, setting).fullmatch(name) is not None
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)

    def _by_pattern(self, setting: str, name: str, otherwise: Any) -> Any:
        """Return the value of the first pattern that matches the end of a name, from a segment's start on."""
        for key, value in getattr(self, setting).items():
            if self._compiled(rf"(.*\.)?({key})$", setting).match(name):
                return value
        return otherwise

    def _of_chosen_layer(self, name: str) -> bool:
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        index = self._layer_index(name)
        return index is not None and index in self.layers_to_transform

    def _layer_index(self, name: str) -> int | None:
        """Return the index that follows the name of a module list, or that of the first list that has one."""
        segments = name.split(".")
        # What precedes the index, or follows it, has at least a segment.
        places = [
            place for place in range(1, len(segments) - 1) if segments[place].isdecimal() and segments[place]
        ]
        if not self.layers_pattern:
            return next((int(segments[place]) for place in places if place >= 2), None)
        for pattern in self.layers_pattern:
            compiled = self._compiled(pattern, "layers_pattern")
            for start in range(len(segments)):
                for place in places:
                    if place > start and compiled.fullmatch(".".join(segments[start:place])):
                        return int(segments[place])
        return None


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str, file: Path, setting: str) -> Pattern:
    """Compile a regular expression of an adapter's settings, which may be hostile.

    ConfigError for what is none, here, or when it is matched for what would take forever.
    """
    return Pattern(
        pattern,
        lambda problem: _error(
            file, setting, pattern, EXPECTED, f"The pattern is {problem}. Write the layers' names instead."
        ),
    )


@names_files
def load_lora_config(path: str | Path) -> LoRAConfig:
    """Read an adapter's settings.  path: its folder, or a hub id.  ConfigError names an unsupported setting."""
    folder = resolve_model_path(path)
    file = folder / CONFIG_FILE
    raw = parse_json_object(read_small_file(file, MAX_CONFIG_BYTES, "config"), file, "config")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise _error(file, "peft_type", kind, "LORA", "Only LoRA adapters can be loaded.")
    for name, why in REFUSED.items():
        if not _is_one_of(raw.get(name), ABSENT.get(name, (None, False))):
            raise _error(
                file,
                name,
                raw[name],
                "an adapter without it",
                f"This is not supported: {why}. Merge the adapter into its model with PEFT.",
            )
    for name, value in raw.items():
        known = name in HONOURED or name in WITHOUT_EFFECT or name in REFUSED
        if not known and not _is_one_of(value, (None, False, [], {}, "")):
            fix = "It may change the results, so it is not ignored. Remove it if it does not matter."
            raise _error(file, name, value, "settings that this version knows", fix)
    for name in SWITCHES:
        if not _is_one_of(raw.get(name), (None, False, True)):
            raise _error(file, name, raw[name], "true or false, without quotes")
    start = raw.get("init_lora_weights", True)
    if not _is_one_of(start, PLAIN_STARTS):
        fix = "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        raise _error(file, "init_lora_weights", start, "a start that leaves the base weights alone", fix)
    return _checked(raw, folder, file)


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    """Tell whether a JSON value is one of these, of the same type: 0 is not false, nor 1 true."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _checked(raw: Mapping[str, Any], folder: Path, file: Path) -> LoRAConfig:
    layers = raw.get("layers_to_transform")
    return LoRAConfig(
        path=folder,
        rank=_rank(raw.get("r", 8), file, "r"),
        alpha=_finite(raw.get("lora_alpha", 8), file, "lora_alpha"),
        target_modules=_names(raw.get("target_modules"), file, "target_modules", required=True),
        rank_stabilised=raw.get("use_rslora") is True,
        exclude_modules=_names(raw.get("exclude_modules"), file, "exclude_modules"),
        layers_to_transform=None
        if layers in (None, [])
        else _indices(layers if isinstance(layers, list) else [layers], file),
        layers_pattern=_list_names(raw.get("layers_pattern"), file),
        rank_pattern=_patterns(raw.get("rank_pattern"), file, "rank_pattern", _rank),
        alpha_pattern=_patterns(raw.get("alpha_pattern"), file, "alpha_pattern", _finite),
    )


def _rank(value: Any, file: Path, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise _error(file, name, value, "a positive integer")
    return value


def _finite(value: Any, file: Path, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
        raise _error(file, name, value, "a number that a float32 can hold")
    return float(value)


def _names(value: Any, file: Path, name: str, required: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        _compile(value, file, name)
        return value
    if value in (None, "", []) and not required:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise _error(file, name, value, "a regular expression or a list of names")
    return tuple(value)


def _list_names(value: Any, file: Path) -> tuple[str, ...]:
    """Read layers_pattern: a pattern, or several."""
    names = _names(value, file, "layers_pattern")
    patterns = (names,) if isinstance(names, str) else names
    for pattern in patterns:
        _compile(pattern, file, "layers_pattern")
    return patterns


def _indices(values: list[Any], file: Path) -> tuple[int, ...]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise _error(file, "layers_to_transform", values, "indices of layers")
    return tuple(values)


def _patterns(value: Any, file: Path, name: str, read: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise _error(file, name, value, "an object of patterns")
    for pattern in value or {}:
        _compile(pattern, file, name)
        _compile(rf"(.*\.)?({pattern})$", file, name)
    return {pattern: read(item, file, f"{name}.{pattern[:200]}") for pattern, item in (value or {}).items()}


def _error(file: Path, name: str, found: Any, expected: str, fix: str | None = None) -> ConfigError:
    return ConfigError(
        "the adapter's settings cannot be honoured",
        code="adapter-config",
        file=str(file),
        tensor=name,
        expected=expected,
        found=repr(found)[:200],
        fix=fix,
    )
