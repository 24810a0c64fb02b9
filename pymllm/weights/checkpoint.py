"""An open checkpoint as data: its config, its files and its tensors, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymllm.errors import CheckpointError
from pymllm.weights.folder import CONFIG, is_gguf
from pymllm.weights.module_names import ModuleNames
from pymllm.weights.tensor_file import TensorFile, TensorInfo


class Checkpoint:
    """A local checkpoint.

    path: the folder, or the (first) GGUF file.  config: config.json, or the settings that a GGUF file has in its place.
    files: in the order in which they are read.  tensors: those of all files by their names in the model, file by file,
    in the order of the bytes.  config_file: the file that `config` was read from.
    metadata: all that a GGUF file's header has besides its tensors (its tokenizer, say); else empty.
    names: all other names of the model's modules.  stored_as: the names that modules and tensors have in the files.
    """

    names = ModuleNames()
    stored_as = ModuleNames()

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


def merge_tensors(files: Sequence[TensorFile]) -> dict[str, TensorInfo]:
    """Collect the tensors of all files.  CheckpointError "duplicate-tensor" for a name that is in two files."""
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in file.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {tensors[name].file.path.name} and {file.path.name}",
                    code="duplicate-tensor",
                    file=str(file.path),
                    tensor=name,
                    fix="Keep only the files of one save: files of an earlier one often stay behind in the folder.",
                )
            tensors[name] = info
    return tensors
