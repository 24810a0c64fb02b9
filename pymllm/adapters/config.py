"""An adapter's settings: PEFT's adapter_config.json, read strictly.

A setting that changes how an adapter is applied is either honoured or refused by its name; a setting that only steered
its training is ignored. Names are matched as PEFT does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError
from pymllm.quantization.storage.fields import compile_pattern
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
        return int(_by_pattern(self.rank_pattern, name, self.rank))

    def scaling_of(self, name: str) -> float:
        """Compute alpha / r, or alpha / √r if the adapter is rank-stabilised."""
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def targets(self, name: str, kind: str) -> bool:
        """Tell whether the adapter is on this layer.  kind: linear, embedding or lm_head."""
        if _matches(self.exclude_modules, name):
            return False
        if self.target_modules == "all-linear":
            return kind == "linear"
        return _matches(self.target_modules, name) and self._of_chosen_layer(name)

    def _of_chosen_layer(self, name: str) -> bool:
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern]
        found = (re.match(pattern, name) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
        index = next((match.group(1) for match in found if match), None)
        return index is not None and int(index) in self.layers_to_transform

    def unmatched(self, kinds: Mapping[str, str]) -> list[str]:
        """List the targets that name none of these layers.  kinds: the layers' kinds by name."""
        if self.target_modules == "all-linear":
            return []
        if isinstance(self.target_modules, str):
            return [] if any(_matches(self.target_modules, name) for name in kinds) else [self.target_modules]
        return [
            target for target in self.target_modules if not any(_matches((target,), name) for name in kinds)
        ]


def _matches(wanted: str | tuple[str, ...], name: str) -> bool:
    """Match a name.  wanted: a regular expression for all of it, or names and endings of whole segments."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches the end of a name, from a segment's start on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def load_lora_config(path: str | Path) -> LoRAConfig:
    """Read an adapter's settings.  path: its folder, or a hub id.  ConfigError names an unsupported setting."""
    folder = resolve_model_path(path)
    file = folder / CONFIG_FILE
    raw = parse_json_object(read_small_file(file, MAX_CONFIG_BYTES, "config"), file, "config")
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise _error(file, "peft_type", kind, "LORA", "Only LoRA adapters can be loaded.")
    for name, why in REFUSED.items():
        if raw.get(name) not in (None, False, [], {}, "none"):
            raise _error(
                file,
                name,
                raw[name],
                "an adapter without it",
                f"This is not supported: {why}. Merge the adapter into its model with PEFT.",
            )
    for name, value in raw.items():
        if name not in HONOURED | WITHOUT_EFFECT | set(REFUSED) and value not in (None, False, [], {}, ""):
            fix = "It may change the results, so it is not ignored. Remove it if it does not matter."
            raise _error(file, name, value, "settings that this version knows", fix)
    start = raw.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        fix = "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        raise _error(file, "init_lora_weights", start, "a start that leaves the base weights alone", fix)
    return _checked(raw, folder, file)


def _checked(raw: Mapping[str, Any], folder: Path, file: Path) -> LoRAConfig:
    layers = raw.get("layers_to_transform")
    return LoRAConfig(
        path=folder,
        rank=_rank(raw.get("r", 8), file, "r"),
        alpha=_finite(raw.get("lora_alpha", 8), file, "lora_alpha"),
        target_modules=_names(raw.get("target_modules"), file, "target_modules", required=True),
        rank_stabilised=bool(raw.get("use_rslora")),
        exclude_modules=_names(raw.get("exclude_modules"), file, "exclude_modules"),
        layers_to_transform=None
        if layers in (None, [])
        else _indices(layers if isinstance(layers, list) else [layers], file),
        layers_pattern=_as_tuple(_names(raw.get("layers_pattern"), file, "layers_pattern")),
        rank_pattern=_patterns(raw.get("rank_pattern"), file, "rank_pattern", _rank),
        alpha_pattern=_patterns(raw.get("alpha_pattern"), file, "alpha_pattern", _finite),
    )


def _rank(value: Any, file: Path, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise _error(file, name, value, "a positive integer")
    return value


def _finite(value: Any, file: Path, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _error(file, name, value, "a number")
    return float(value)


def _names(value: Any, file: Path, name: str, required: bool = False) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        _check_pattern(value, file, name)
        return value
    if value in (None, "", []) and not required:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        raise _error(file, name, value, "a regular expression or a list of names")
    return tuple(value)


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _indices(values: list[Any], file: Path) -> tuple[int, ...]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise _error(file, "layers_to_transform", values, "indices of layers")
    return tuple(values)


def _patterns(value: Any, file: Path, name: str, read: Any) -> dict[str, Any]:
    if not isinstance(value or {}, Mapping):
        raise _error(file, name, value, "an object of patterns")
    for pattern in value or {}:
        _check_pattern(pattern, file, name)
    return {pattern: read(item, file, f"{name}.{pattern}") for pattern, item in (value or {}).items()}


def _check_pattern(pattern: str, file: Path, name: str) -> None:
    """Refuse a pattern that is none, or that could take forever: an adapter may be hostile."""
    try:
        compile_pattern(pattern, name)
    except ConfigError as error:
        raise _error(file, name, pattern, error.expected or "a regular expression") from None


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
