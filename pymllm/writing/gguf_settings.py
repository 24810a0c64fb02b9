"""The settings of a model as a GGUF file's metadata: `weights/gguf_config.py` the other way round.

What was written is read again at once, and must be the same model: every setting of the family, every layer's window,
and the angles of its rotary positions. What a file of the architecture cannot say is refused before any weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm.config import ModelConfig, RopeParameters
from pymllm.errors import ConfigError, PymllmError, choices, nearest
from pymllm.layers.rotary_embedding import default_frequencies, get_rope, llama3_frequencies
from pymllm.models import gguf_architectures, read_model_config
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.gguf_config import (
    FREQUENCY_FACTORS,
    LONG_FACTORS,
    PATTERN,
    SETTINGS,
    WINDOW,
    WINDOW_THETA,
    ConfigReader,
)
from pymllm.writing.gguf_container import FileTensor

COMPUTED = ("num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings")
# Settings that are compared by what they do.
ROTARY = {"rope_theta", "rope_parameters", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
WINDOWS = {
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "sliding_window_pattern",
}
# What their own tensors, or others of these settings, show.
SHOWN = {"original_max_position_embeddings", "num_local_experts", "num_experts", "attention_bias", "mlp_bias"}
SHOWN |= {"qkv_bias", "tie_word_embeddings", "max_position_embeddings"}
FLOATING = (
    "epsilon",
    "freq_base",
    "softcapping",
    "scale",
    "clamp",
)  # in keys of numbers that are never integers
POSITIONS = (0, 1, 2, 3, 17, 100, 1000)  # whose angles are compared, and the last one of a short table
LONGEST = 8192


def find_architecture(config: ModelConfig) -> tuple[str, GGUFArchitecture]:
    """Find the architecture of the model's files, and its name there.  ConfigError if there is none."""
    model_type = config.raw["model_type"]
    names = []
    for name, known in gguf_architectures().items():
        for one in (known, known.with_experts):
            if one is not None:
                names += [one.model_type] + ([one.windowed_type] if one.windowed_type else [])
                if model_type in (one.model_type, one.windowed_type):
                    return name, one
    raise ConfigError(
        f"there is no word on what GGUF files call the tensors of {model_type}",
        code="spelling",
        file="config.json",
        tensor="model_type",
        expected=choices(sorted(names), model_type),
        found=model_type,
        fix=f"{nearest(str(model_type), names)} Write another format: --format compressed-tensors.".lstrip(),
    )


def write_settings(
    name: str, known: GGUFArchitecture, config: ModelConfig, vocabulary: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write the entries of a model, and the tensors that are settings too: factors of rotary frequencies.

    name: of the architecture.  vocabulary: rows of the embedding.
    ConfigError for a rotary scaling that files cannot say.
    """
    layers = range(config.size("num_hidden_layers"))
    windows = [config.sliding_window_of(layer) for layer in layers]
    full = next((layer for layer in layers if windows[layer] is None), 0)
    rope = config.rope_parameters_of(full)
    written: dict[str, Any] = {}
    for key, setting in {**SETTINGS, **known.settings}.items():
        value = rope.theta if setting == "rope_theta" else _value(config, setting)
        if value is not None:
            written[key] = float(value) if any(word in key for word in FLOATING) else value
    written["attention.value_length"] = config.head_dim
    written["vocab_size"] = vocabulary
    rotated = int(config.head_dim * rope.partial_rotary_factor)
    written["rope.dimension_count"] = rotated
    sliding = [layer for layer in layers if windows[layer] is not None]
    if sliding:
        written[WINDOW] = windows[sliding[0]]
        theta = config.rope_parameters_of(sliding[0]).theta
        if len(sliding) < len(windows) and theta != (known.sliding_theta or rope.theta):
            written[WINDOW_THETA] = theta
        usual = [not known.sliding or layer % known.sliding < known.sliding - 1 for layer in layers]
        if [window is not None for window in windows] != usual:
            written[PATTERN] = np.array([window is not None for window in windows])
    scaling, tensors = _scaling(rope, rotated, config)
    return {f"{name}.{key}": value for key, value in (written | scaling).items()}, tensors


def _value(config: ModelConfig, setting: str) -> Any:
    """Return a setting in the type that files have it in; None: it is not set, or switched off."""
    value = getattr(config, setting) if setting in COMPUTED else config.get(setting)
    if value is None and setting in ("num_experts", "num_local_experts"):
        value = config.get("num_local_experts" if setting == "num_experts" else "num_experts")
    return value


def _scaling(
    rope: RopeParameters, rotated: int, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a rotary scaling: its entries after "ARCHITECTURE.", and its tensors."""
    kind, given = rope.rope_type, rope.scaling
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {"rope.scaling.type": kind, "rope.scaling.factor": float(given["factor"])}, {}
    if kind in ("llama3", "factors"):
        factors = torch.tensor(given.get("factors", ()))
        if kind == "llama3":
            factors = default_frequencies(rotated, rope.theta) / llama3_frequencies(
                rotated, rope.theta, given
            )
        return {}, {FREQUENCY_FACTORS: factors.float()}
    trained = int(given.get("original_max_position_embeddings") or 0)
    if kind == "yarn":
        factor = given.get("factor") or config.size("max_position_embeddings") / (trained or 1)
        entries: dict[str, Any] = {"type": kind, "factor": float(factor)}
        if trained:
            entries["original_context_length"] = trained
        for key, setting in {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}.items():
            if given.get(setting):
                entries[key] = float(given[setting])
        return {f"rope.scaling.{key}": value for key, value in entries.items()}, {}
    if kind == "longrope":
        growth = given.get("factor") or config.size("max_position_embeddings") / (trained or 1)
        attention = given.get("attention_factor")
        if attention is None:
            attention = 1.0 if growth <= 1 else math.sqrt(1 + math.log(growth) / math.log(trained))
        entries = {
            "rope.scaling.attn_factor": float(attention),
            "rope.scaling.original_context_length": trained,
        }
        return entries, {name: torch.tensor(given[key]).float() for key, name in LONG_FACTORS.items()}
    raise _cannot("rope_parameters", f"a GGUF file cannot say the rotary scaling {kind!r}", kind)


def check_settings(
    name: str,
    known: GGUFArchitecture,
    config: ModelConfig,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, FileTensor],
    factors: Mapping[str, Tensor],
) -> None:
    """Read what was written as a reader does.  ConfigError where that is another model.

    tensors: of the file, by name.  factors: of the rotary frequencies.
    """
    infos: dict[str, Any] = {
        tensor.name: SimpleNamespace(
            shape=tensor.shape,
            dtype_name=tensor.type,
            torch_dtype=torch.float32 if tensor.type == "F32" else None,
            read=lambda tensor=tensor: factors[tensor.name],
        )
        for tensor in tensors.values()
    }
    # Numbers as files have them, in float32.
    values = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata.items()}
    try:
        raw = ConfigReader(Path("(the file to be written)"), values, name, known).read(infos)
    except PymllmError as error:
        raise _cannot(
            "model_type", f"a GGUF file of {name} cannot say the model's settings: {error}", ""
        ) from None
    back = read_model_config(raw)
    tied = config.tie_word_embeddings and "output.weight" not in tensors
    if back.tie_word_embeddings != tied:
        raise _cannot("tie_word_embeddings", "the head's tensor contradicts it", str(tied))
    names = {*config.defaults, *SETTINGS.values(), *known.settings.values(), *COMPUTED}
    for setting in sorted(names - ROTARY - WINDOWS - SHOWN):
        ours, theirs = (_comparable(one, setting) for one in (config, back))
        if ours != theirs:
            raise _cannot(setting, f"a GGUF file of {name} has no word for it, and means {theirs!r}", ours)
    for layer in range(config.size("num_hidden_layers")):
        if config.sliding_window_of(layer) != back.sliding_window_of(layer):
            raise _cannot(
                "sliding_window",
                f"a GGUF file of {name} cannot say the window of layer {layer}",
                config.sliding_window_of(layer),
            )
    compared: set[tuple[str, str]] = set()
    for layer in range(config.size("num_hidden_layers")):
        pair = config.rope_parameters_of(layer), back.rope_parameters_of(layer)
        if (repr(pair[0]), repr(pair[1])) not in compared:
            compared.add((repr(pair[0]), repr(pair[1])))
            if not _same_angles(config, *pair):
                raise _cannot("rope_parameters", f"a GGUF file of {name} has other angles", pair[0].rope_type)


def _comparable(config: ModelConfig, setting: str) -> Any:
    """Return a setting so that equal ones are equal: numbers to the precision of a file, absent ones as off."""
    value = getattr(config, setting) if setting in COMPUTED else config.get(setting)
    if setting in ("hidden_act", "hidden_activation") and value == "gelu":
        return "gelu_pytorch_tanh"  # what early configs call it
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value or None


def _same_angles(config: ModelConfig, ours: RopeParameters, theirs: RopeParameters) -> bool:
    """Compare the cosines and sines that two settings give at some positions, short and long."""
    length = config.size("max_position_embeddings")
    short = [position for position in POSITIONS if position < min(length, LONGEST)]
    for positions in (short, [*short, min(length, LONGEST) - 1]):
        tables = []
        for rope in (ours, theirs):
            rotated = int(config.head_dim * rope.partial_rotary_factor)
            module: Any = get_rope(config.head_dim, rotated, length, rope.theta, rope.scaling, rope.rope_type)
            tables.append(torch.stack(module.cos_sin(torch.tensor(positions))))
        # Factors are stored in float32: angles of far positions differ by a few of its steps.
        if tables[0].shape != tables[1].shape or not torch.allclose(tables[0], tables[1], atol=2e-3):
            return False
    return True


def _cannot(setting: str, message: str, found: Any) -> ConfigError:
    return ConfigError(
        f"the model's {setting} cannot be written: {message}",
        code="spelling",
        file="config.json",
        tensor=setting,
        found=repr(found),
        fix="Write another format: --format compressed-tensors.",
    )
