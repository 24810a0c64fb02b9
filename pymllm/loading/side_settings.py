"""Settings of a format in a file of its own, beside config.json: read where that has none, else compared with it."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError
from pymllm.quantization.base import QuantizationConfig, get_quantization_config, list_quantization_methods
from pymllm.quantization.storage.settings import QUANT_METHOD, Settings
from pymllm.weights.folder import MAX_CONFIG_BYTES
from pymllm.weights.json_text import read_json_object

FIX = "Keep the settings that the weights were written with, and take the others away."


@dataclass(frozen=True)
class SideFile:
    """A file of settings.  name: of the format that keeps its settings there, or that the file itself names."""

    path: Path
    name: str
    settings: Mapping[str, Any]


def side_files(folder: Path) -> Iterator[SideFile]:
    """Yield the files of settings that lie beside config.json.  CheckpointError for one that is not a JSON object."""
    for name in list_quantization_methods():
        for file in get_quantization_config(name).get_config_filenames():
            path = folder / file
            if os.path.lexists(path):
                settings = read_json_object(path, MAX_CONFIG_BYTES, "config", allow_non_finite=True)
                yield SideFile(path, method_name(settings.get(QUANT_METHOD) or name), settings)


def method_name(name: Any) -> str:
    """Spell the name of a format as it is registered."""
    return str(name).lower().replace("_", "-")


def refuse_contradictions(folder: Path, settings: Settings, read: QuantizationConfig) -> None:
    """Raise ConfigError where a file beside config.json says something else of the weights.

    What one of them does not say, or what the format does not read, is no contradiction; nor is which layers are left
    out, as the tensors tell.
    settings: those of config.json.  read: what they mean.
    """
    for side in side_files(folder):
        theirs = read.settings_beside(side.name, side.settings)
        if theirs is None:
            raise _contradiction(side, settings, QUANT_METHOD, read.get_name(), side.name)
        for key, value in theirs.items():
            if value is None or not settings.was_read(key):
                continue
            changed = Settings({**settings.plain(), key: value}, file=str(side.path), root="")
            try:
                same = read.means_the_same(type(read).from_config(changed))
            except ConfigError:
                same = False
            if not same:
                raise _contradiction(side, settings, key, settings.plain().get(key), value)


def _contradiction(side: SideFile, settings: Settings, key: str, ours: Any, theirs: Any) -> ConfigError:
    return ConfigError(
        f"{settings.file} and {side.path.name} say different things of the same weights: {key}",
        code="quantization-config",
        file=str(side.path),
        tensor=key,
        expected=f"{reprlib.repr(ours)}, as {settings.place((key,))} has it",
        found=reprlib.repr(theirs),
        fix=FIX,
    )
