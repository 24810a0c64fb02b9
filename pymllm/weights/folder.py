"""A checkpoint's folder: its config, its index, and the choice of the files that are read.

These are the files that `model.safetensors.index.json` names; without it `model.safetensors`; without that every
`*.safetensors`. An index that disagrees with its files is an error, and pickles are never opened.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymllm.errors import CheckpointError, counted, first_few
from pymllm.weights.json_text import read_json_object
from pymllm.weights.links import check_link
from pymllm.weights.remote import remote_file, remote_names
from pymllm.weights.tensor_file import TensorInfo, check_tensor_name

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODULES = "modules.json"  # of sentence-transformers
UNFINISHED = ".unfinished"  # where `pymllm quantize` keeps what it has made, until all of it is there
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 100_000_000
MAX_NAME = 255  # bytes of a file's name, as file systems have it


def is_gguf(path: Path) -> bool:
    """Tell from its ending whether a path names a GGUF file."""
    return path.name.lower().endswith(".gguf") and not path.is_dir()


def read_config(path: Path) -> dict[str, Any]:
    """Read the config.json of a folder.  Raises CheckpointError "config-missing", or as `parse_json_object`."""
    if not os.path.lexists(path / CONFIG):
        if os.path.lexists(path / UNFINISHED):
            raise CheckpointError(
                "the folder holds a checkpoint that `pymllm quantize` has not finished",
                code="unfinished",
                file=str(path),
                fix="Run the same `pymllm quantize` again: it goes on where it was.",
            )
        files = [name for name in list_names(path) if name.lower().endswith(".gguf")]
        raise CheckpointError(
            "the folder has no config.json",
            code="config-missing",
            file=str(path / CONFIG),
            fix=f"Pass the GGUF file itself: {path / files[0]}."
            if files
            else "Copy the model's config.json beside its weights.",
        )
    # transformers writes Infinity into configs (time_step_limit of state-space models).
    return read_json_object(path / CONFIG, MAX_CONFIG_BYTES, "config", allow_non_finite=True)


def module_path(path: Any, file: Path) -> str:
    """Check the folder that modules.json gives a module, "" for its own.  CheckpointError for one that leads elsewhere.

    file: that modules.json.
    """
    plain = isinstance(path, str) and not path.startswith(".") and not set(path) & set("/\\:")
    if plain and path.isprintable() and len(path.encode()) <= MAX_NAME:
        check_link(file.parent / path)
        return str(path)
    raise CheckpointError(
        "modules.json gives a module a folder that may lead out of its own",
        code="index-escapes",
        file=str(file),
        expected="the plain name of a folder beside modules.json",
        found=reprlib.repr(path),
        fix="Do not use this checkpoint unless you know why it says so.",
    )


def list_names(path: Path) -> list[str]:
    """List the names in a folder, also those of a hub's files that are to lie there.  CheckpointError "unreadable"."""
    try:
        return sorted({*os.listdir(path), *remote_names(path)})
    except OSError as error:
        raise CheckpointError(
            f"cannot list the folder: {error.strerror}",
            code="unreadable",
            file=str(path),
            fix="Check the folder's permissions.",
        ) from error


def pick_files(path: Path, names: Sequence[str]) -> list[str]:
    """Choose the weight files of a folder without an index.  CheckpointError "pickle-only" or "weights-missing"."""
    if SINGLE in names:
        return [SINGLE]
    found = [name for name in names if name.endswith(".safetensors")]
    # consolidated*.safetensors hold the same weights again under another library's names.
    found = [name for name in found if not name.startswith("consolidated")] or found
    if found:
        return found
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            "the folder has its weights only as pickles, which can run code when they are opened",
            code="pickle-only",
            file=str(path / pickles[0]),
            expected="*.safetensors",
            found=reprlib.repr(pickles),
            fix="Convert them if you trust them: load with transformers and model.save_pretrained(folder), "
            "or torch.load(file, weights_only=True) and safetensors.torch.save_file(tensors, path).",
        )
    raise CheckpointError(
        "the folder has no weights",
        code="weights-missing",
        file=str(path),
        expected=f"{INDEX}, {SINGLE} or *.safetensors",
        found=reprlib.repr(list(names)),
        fix="Download the model again.",
    )


def read_index(path: Path) -> dict[str, str]:
    """Read an index: the file of every tensor by the tensor's name, every file name a plain base name.

    Raises CheckpointError "index-entry" or "index-escapes", or as `parse_json_object`.
    """
    index = read_json_object(path, MAX_INDEX_BYTES, "index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index maps no tensors",
            code="index-entry",
            file=str(path),
            expected='an object "weight_map" of tensor name to file name',
            found=reprlib.repr(weight_map),
            fix="Download the index again.",
        )
    for tensor, name in weight_map.items():
        check_tensor_name(path, tensor, "index-entry")
        if not isinstance(name, str):
            problem, code = "the index maps this tensor to something that is no file name", "index-entry"
        elif name in ("", ".", "..") or set(name) & set("/\\:") or not name.isprintable():
            problem, code = (
                "the index maps this tensor to a path that may lead out of the folder",
                "index-escapes",
            )
        elif not name.endswith(".safetensors"):
            problem, code = "the index maps this tensor to a file of another format", "index-entry"
        else:
            continue
        raise CheckpointError(
            problem,
            code=code,
            file=str(path),
            tensor=tensor,
            expected="the plain name of a .safetensors file in the same folder",
            found=reprlib.repr(name),
            fix="Do not use this checkpoint unless you know why its index says so.",
        )
    return weight_map


def check_shards_exist(path: Path, shards: Sequence[str]) -> None:
    """Raise one CheckpointError "shards-missing" that names all missing shards, if any is."""
    missing = []
    for name in shards:
        try:
            if remote_file(path / name) is None:
                os.stat(path / name)
        except FileNotFoundError:  # also a link whose target is gone
            missing.append(name)
        except OSError:
            pass  # the error of opening the file says more
    if missing:
        fix = "Download the missing files"
        if SINGLE not in missing and os.path.exists(path / SINGLE):
            fix += f", or delete the index to use {SINGLE}"
        head = f"{len(missing)} of {counted(len(shards), 'shard is', 'shards are')} missing:"
        raise CheckpointError(
            f"{head} {', '.join(missing)}",
            code="shards-missing",
            file=str(path / INDEX),
            fix=fix + ".",
            brief=f"{head} {first_few(missing)}",
        )


def check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Raise one CheckpointError "index-disagrees" unless the index and the shards say the same, both ways."""
    problems: dict[str, str] = {}
    for name, shard in weight_map.items():
        if name not in tensors:
            problems[name] = f"{name!r} is mapped to {shard}, which lacks it"
        elif tensors[name].file.path.name != shard:
            problems[name] = f"{name!r} is mapped to {shard} but is in {tensors[name].file.path.name}"
    for name, info in tensors.items():
        if name not in weight_map:
            problems[name] = f"{name!r} is in {info.file.path.name} but is not mapped"
    if problems:
        head, listed = "the index and the shards disagree:", list(problems.values())
        raise CheckpointError(
            f"{head} {'; '.join(listed)}",
            code="index-disagrees",
            file=str(path),
            tensor=next(iter(problems)),
            fix="The index and the files are of different saves: download all of them again.",
            brief=f"{head} {first_few(listed, '; ')}",
        )
