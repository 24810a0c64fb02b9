"""A checkpoint: a folder of config.json and safetensors files, or a GGUF file, checked from headers alone.

Which files of a folder are read: those that `model.safetensors.index.json` names; without it `model.safetensors`;
without that every `*.safetensors`.  Whatever disagrees is an error, and pickles are never opened.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymllm.errors import CheckpointError, first_few
from pymllm.weights.safetensors_file import SafetensorsFile, parse_json_object
from pymllm.weights.tensor_file import TensorFile, TensorInfo, check_tensor_name, read_small_file

__all__ = ["Checkpoint", "SafetensorsFile", "TensorInfo", "resolve_model_path"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 100_000_000
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


class Checkpoint:
    """A local checkpoint.

    path: the folder, or the (first) GGUF file.  config: config.json, or what stands for it.  files: in the order in
    which they are read.  tensors: of all files by their names in the model, file by file, in the order of the bytes.
    config_file: where `config` was read.  metadata: what a GGUF file says besides (its tokenizer, say); else empty.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        files: Sequence[TensorFile],
        *,
        tensors: Mapping[str, TensorInfo] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.config = config
        self.files = list(files)
        self.tensors = dict(tensors) if tensors is not None else merge_tensors(self.files)
        self.metadata = dict(metadata or {})
        self.config_file = path if is_gguf(path) else path / CONFIG

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read config.json, the index and every header; no tensor byte.

        Raises CheckpointError; its code for the folder is one of: folder-missing, config-missing, config-json
        (and -utf8, -duplicate-key, -too-large; the same of index), index-entry, index-escapes,
        index-disagrees, shards-missing, duplicate-tensor, pickle-only, weights-missing, unreadable;
        for a file: see SafetensorsFile.open, and for a GGUF file `open_gguf`.
        """
        path = Path(path)
        if is_gguf(path):
            from pymllm.weights.gguf_checkpoint import open_gguf

            return open_gguf(path)
        if not path.is_dir():
            raise CheckpointError(
                "not a folder",
                code="folder-missing",
                file=str(path),
                expected="a folder with config.json and safetensors files, or a .gguf file",
                fix="Pass the checkpoint's folder; hub ids go through resolve_model_path.",
            )
        config = _read_config(path)
        names = _list(path)
        if INDEX in names:
            weight_map = _read_index(path / INDEX)
            shards = sorted(set(weight_map.values()))
            _check_shards_exist(path, shards)
            checkpoint = cls(path, config, [SafetensorsFile.open(path / name) for name in shards])
            _check_index(path / INDEX, weight_map, checkpoint.tensors)
            return checkpoint
        return cls(path, config, [SafetensorsFile.open(path / name) for name in _pick_files(path, names)])

    def close(self) -> None:
        """Release the open files; a later read opens them again."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors in {len(self.files)} files)"


def resolve_model_path(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or of a hub id "org/name" in the hub's cache, downloaded if need be.

    model: a Path is always local; a str is local if that folder, or .gguf file, exists.
    Only the files that loading needs are downloaded.  HF_HUB_OFFLINE and the hub's other settings hold.
    Raises CheckpointError "model-not-found" if it is neither, "revision" for a revision of a local folder.
    """
    folder = Path(model)
    if (folder.is_dir() and model != "") or (is_gguf(folder) and os.path.lexists(folder)):
        if revision is not None:
            raise CheckpointError(
                f"a local model has no revision {revision!r}",
                code="revision",
                file=str(folder),
                fix="Leave the revision out, or pass a hub id.",
            )
        return folder
    if isinstance(model, Path) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) or folder.exists():
        raise CheckpointError(
            f"{str(model)!r} is neither a local folder nor a hub id, nor a .gguf file",
            code="model-not-found",
            expected='a folder, a .gguf file, or "org/name"',
            fix="Check the spelling and the working directory.",
        )

    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # HfHubHTTPError's base is the HTTP library's own error, which e.g. a proxy's refusal is.
    failures: tuple[type[BaseException], ...] = (OSError, EntryNotFoundError, HFValidationError)
    failures += HfHubHTTPError.__bases__
    try:
        snapshot = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=DOWNLOADED,
            ignore_patterns=["*/*.safetensors"],  # other copies of the weights (original/, onnx/)
        )
    except failures as error:
        reason = " ".join(str(error).split())[:500]
        raise CheckpointError(
            f"{model!r} is not a local folder, and the hub did not give it: {reason}",
            code="model-not-found",
            fix="Check the id, the revision, the access rights and the network. "
            "With HF_HUB_OFFLINE=1 it must be in the cache already.",
        ) from error
    return Path(snapshot)


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file, from its ending."""
    return path.name.lower().endswith(".gguf") and not path.is_dir()


def _read_config(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path / CONFIG):
        files = [name for name in _list(path) if name.lower().endswith(".gguf")]
        raise CheckpointError(
            "the folder has no config.json",
            code="config-missing",
            file=str(path / CONFIG),
            fix=f"Pass the GGUF file itself: {path / files[0]}."
            if files
            else "Copy the model's config.json beside its weights.",
        )
    raw = read_small_file(path / CONFIG, MAX_CONFIG_BYTES, "config")
    # transformers writes Infinity into configs (time_step_limit of state-space models).
    return parse_json_object(raw, path / CONFIG, "config", allow_non_finite=True)


def _list(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(
            f"cannot list the folder: {error.strerror}",
            code="unreadable",
            file=str(path),
            fix="Check its permissions.",
        ) from error


def _pick_files(path: Path, names: Sequence[str]) -> list[str]:
    """The weight files of a folder without an index."""
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
            "the weights are only there as pickles, which can run code when opened",
            code="pickle-only",
            file=str(path / pickles[0]),
            expected="*.safetensors",
            found=reprlib.repr(pickles),
            fix="Convert them, if you trust them: load with transformers and model.save_pretrained(folder), "
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


def _read_index(path: Path) -> dict[str, str]:
    """weight_map: tensor name -> file name, every one a plain base name."""
    weight_map = parse_json_object(read_small_file(path, MAX_INDEX_BYTES, "index"), path, "index").get(
        "weight_map"
    )
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "the index maps no tensors",
            code="index-entry",
            file=str(path),
            expected='an object "weight_map" of tensor name to file name',
            found=reprlib.repr(weight_map),
            fix="Download it again.",
        )
    for tensor, name in weight_map.items():
        check_tensor_name(path, tensor, "index-entry")
        if not isinstance(name, str):
            problem, code = "the index maps it to something else than a file name", "index-entry"
        elif name in ("", ".", "..") or set(name) & set("/\\:") or not name.isprintable():
            problem, code = "the index leads out of the folder", "index-escapes"
        elif not name.endswith(".safetensors"):
            problem, code = "the index maps it to a file of another format", "index-entry"
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


def _check_shards_exist(path: Path, shards: Sequence[str]) -> None:
    """Raise one error with all missing shards."""
    missing = []
    for name in shards:
        try:
            os.stat(path / name)
        except FileNotFoundError:  # also a link whose target is gone
            missing.append(name)
        except OSError:
            pass  # opening it says more
    if missing:
        fix = "Download the missing files"
        if SINGLE not in missing and os.path.exists(path / SINGLE):
            fix += f", or delete the index to use {SINGLE}"
        head = f"{len(missing)} of {len(shards)} shards are missing:"
        raise CheckpointError(
            f"{head} {', '.join(missing)}",
            code="shards-missing",
            file=str(path / INDEX),
            fix=fix + ".",
            brief=f"{head} {first_few(missing)}",
        )


def merge_tensors(files: Sequence[TensorFile]) -> dict[str, TensorInfo]:
    """The tensors of all files.  CheckpointError "duplicate-tensor" for a name that is in two."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {tensors[name].file.path.name} and {file.path.name}",
                    code="duplicate-tensor",
                    file=str(file.path),
                    tensor=name,
                    fix="Keep only the files of one save; leftovers of another often stay in the folder.",
                )
            tensors[name] = info
    return tensors


def _check_index(path: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Raise one error unless the index and the shards say the same, both ways."""
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
            fix="The files are of different saves: download all of them again.",
            brief=f"{head} {first_few(listed, '; ')}",
        )
