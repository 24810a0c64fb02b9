"""Opening a checkpoint by its name: a folder of config.json and safetensors files, a GGUF file, or a hub id."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pymllm.disk import names_files, near_paths
from pymllm.errors import CheckpointError, ConfigError
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.folder import (
    CONFIG,
    INDEX,
    MAX_CONFIG_BYTES,
    MODULES,
    UNFINISHED,
    check_index,
    check_shards_exist,
    is_gguf,
    list_names,
    module_path,
    pick_files,
    read_config,
    read_index,
)
from pymllm.weights.gguf_architecture import GGUFArchitecture
from pymllm.weights.gguf_checkpoint import open_gguf
from pymllm.weights.hub import find_model, parse_hub_name
from pymllm.weights.json_text import parse_json
from pymllm.weights.remote import remote_file
from pymllm.weights.safetensors_file import SafetensorsFile
from pymllm.weights.shipped import shipped_model
from pymllm.weights.tensor_file import read_small_file

PARALLEL_REQUESTS = 8


@names_files
def resolve_model_path(
    model: str | Path | None, revision: str | None = None, *, download: bool = True
) -> Path:
    """Find the folder (or .gguf file) of a model: the path itself, or a hub id's folder in the hub's cache.

    model: a Path is always local; a str is local if that folder, or .gguf file, exists, and else a hub id "org/name",
    "org/name:Q4_K_M" or "org/name/file.gguf"; None is the small model that comes with the package.
    HF_HUB_OFFLINE and the hub's other settings hold.
    download: whether to download all files that loading needs; else only the small ones (`weights/hub.py`).
    Raises CheckpointError "model-not-found" if it is neither, "revision" for a revision of a local model.
    """
    if model is None:
        model = shipped_model()
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            "the model is neither a path nor a hub id",
            code="argument-type",
            expected='a folder, a .gguf file, or "org/name"',
            found=reprlib.repr(model),
        )
    folder = Path(model)
    if (folder.is_dir() and model != "") or (is_gguf(folder) and os.path.lexists(folder)):
        if revision is not None:
            raise CheckpointError(
                f"this is a local model, which has no revision {revision!r}",
                code="revision",
                file=str(folder),
                fix="Leave the revision out, or pass a hub id in place of the path.",
            )
        return _transformer_in(folder)
    if os.path.lexists(f"{model}{UNFINISHED}"):
        raise CheckpointError(
            "the file is one that `pymllm quantize` has not finished",
            code="unfinished",
            file=str(model),
            fix="Run the same `pymllm quantize` again: it goes on where it was.",
        )
    name = None if isinstance(model, Path) or folder.exists() else parse_hub_name(model)
    if name is None:
        raise CheckpointError(
            f"{str(model)!r} is neither a local folder nor a hub id, nor a .gguf file",
            code="model-not-found",
            expected='a folder, a .gguf file, "org/name" or "org/name:Q4_K_M"',
            fix=" ".join(filter(None, (near_paths(folder), "Check the spelling and the working directory."))),
        )

    found = find_model(name, revision, download)
    return found if is_gguf(found) else _transformer_in(found)


def _transformer_in(folder: Path) -> Path:
    """Find the model in a folder of sentence-transformers' modules, whose first one may lie in a folder of its own."""
    file = folder / MODULES
    if (folder / CONFIG).exists() or not file.is_file():
        return folder
    try:
        raw = read_small_file(file, MAX_CONFIG_BYTES, "config")
        first = parse_json(raw, file, "config")[0]["path"]
    except (CheckpointError, LookupError, TypeError):
        return folder  # whose config.json is missing: what opens it says so
    inside = folder / module_path(first, file)
    return inside if (inside / CONFIG).is_file() else folder


@names_files
def open_checkpoint(
    path: str | Path, architectures: Mapping[str, GGUFArchitecture] | None = None
) -> Checkpoint:
    """Open a checkpoint: read its config.json, its index and the header of every file, but no tensor.

    architectures: what model definitions say of GGUF files (`pymllm.models.gguf_architectures`).
    Raises CheckpointError; its code for the folder is one of: folder-missing, config-missing, config-json
    (and -utf8, -duplicate-key, -too-large; the same of index), index-entry, index-escapes,
    index-disagrees, shards-missing, duplicate-tensor, pickle-only, weights-missing, unreadable;
    for a file: see SafetensorsFile.open, and for a GGUF file `open_gguf`.
    """
    path = Path(path)
    if is_gguf(path):
        return open_gguf(path, architectures or {})
    if not path.is_dir():
        raise CheckpointError(
            "the checkpoint's path is not a folder",
            code="folder-missing",
            file=str(path),
            expected="a folder with config.json and safetensors files, or a .gguf file",
            fix="Pass the checkpoint's folder; resolve_model_path finds that of a hub id.",
        )
    config = read_config(path)
    names = list_names(path)
    if INDEX in names:
        weight_map = read_index(path / INDEX)
        shards = sorted(set(weight_map.values()))
        check_shards_exist(path, shards)
        checkpoint = Checkpoint(path, config, _open_all(path, shards))
        check_index(path / INDEX, weight_map, checkpoint.tensors)
        return checkpoint
    return Checkpoint(path, config, _open_all(path, pick_files(path, names)))


def _open_all(folder: Path, names: Sequence[str]) -> list[SafetensorsFile]:
    """Read the headers of files; those of a hub's files several at a time."""
    paths = [folder / name for name in names]
    if len(paths) == 1 or all(remote_file(path) is None for path in paths):
        return [SafetensorsFile.open(path) for path in paths]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(SafetensorsFile.open, paths))
