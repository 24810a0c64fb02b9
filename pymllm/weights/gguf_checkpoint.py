"""A GGUF model as a checkpoint: its tensors under the names of Hugging Face's models, its metadata as a config.

What the file's writer changed is undone here, so that formats, models and sharding need not know of it
(`gguf_architecture.py`): rows of q and k that are stored with the halves of each head interleaved are read in their own
order, norms without what was added to them, and a tensor that holds all experts of a layer, or several parts side by
side, as one tensor for each.
A model in several files (NAME-00001-of-0000N.gguf) is opened by its first.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pymllm.errors import CheckpointError, choices, counted, first_few, nearest
from pymllm.weights.checkpoint import Checkpoint, merge_tensors
from pymllm.weights.gguf_architecture import Change, GGUFArchitecture, Interleaved
from pymllm.weights.gguf_config import ConfigReader
from pymllm.weights.gguf_file import GGUFFile
from pymllm.weights.links import check_link
from pymllm.weights.remote import remote_file
from pymllm.weights.tensor_file import TensorInfo

QUANTISED = torch.uint8  # the dtype that blocks are read as
FACTORS = (".scale", ".input_scale")  # suffixes of a factor beside blocks: one number for a matrix
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def open_gguf(path: Path, architectures: Mapping[str, GGUFArchitecture]) -> Checkpoint:
    """Read the headers of all files of a GGUF model.

    architectures: what model definitions say of their files, by `general.architecture`.
    Raises CheckpointError; its code for a file: see `GGUFFile.open`; for the model it is one of: shards-missing,
    split-part, split-disagrees, duplicate-tensor, config-key, config-value, config-missing-setting, architecture,
    shape, bad-content.
    """
    files = _open_parts(path)
    metadata = files[0].metadata
    name = metadata.get("general.architecture")
    architecture = architectures.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise CheckpointError(
            f"GGUF files of the architecture {reprlib.repr(name)} cannot be read",
            code="architecture",
            file=str(path),
            expected=choices(sorted(architectures), name) or "a file that is opened with a model definition",
            found=reprlib.repr(name),
            fix=nearest(str(name), architectures),
        )
    stored = merge_tensors(files)
    if architecture.with_experts is not None and "blk.0.ffn_gate_inp.weight" in stored:
        architecture = architecture.with_experts
    config = ConfigReader(path, metadata, str(name), architecture).read(stored)
    tensors: dict[str, TensorInfo] = {}
    for info in stored.values():
        for named in _model_tensors(info, architecture, config):
            if named.name in tensors:
                raise CheckpointError(
                    f"two tensors of the file are the model's {named.name!r}",
                    code="duplicate-tensor",
                    file=str(path),
                    tensor=info.name,
                    fix="The file is badly written: convert or download it again.",
                )
            tensors[named.name] = named
    types = {
        name.removesuffix(".weight"): info.dtype_name
        for name, info in tensors.items()
        if info.torch_dtype is QUANTISED
    }
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    return Checkpoint(path, config, files, tensors=tensors, metadata=metadata)


def _model_tensors(
    stored: TensorInfo, architecture: GGUFArchitecture, config: Mapping[str, Any]
) -> Iterator[TensorInfo]:
    """Yield the model's tensors that one of a file holds."""
    names, head_dim = architecture.model_names(stored.name), config["head_dim"]
    for expert, one in enumerate(_experts(stored, config)) if "{}" in names[0] else ((None, stored),):
        for name, part in zip(names, _rows(one, names, config), strict=True):
            named = replace(part, name=name if expert is None else name.format(expert))
            change = architecture.change_of(named.name, head_dim)
            fits = named.torch_dtype is not QUANTISED or isinstance(change, Interleaved)
            if (
                name.endswith("shared_expert_gate.weight") and len(named.shape) == 1
            ):  # writers drop its dim of one row
                named = replace(named, shape=(1, *named.shape))
            if change is not None and fits and named.shape and named.shape[0] % change.rows == 0:
                named = ChangedTensor(**vars(named), change=change)
            yield named


def _experts(stored: TensorInfo, config: Mapping[str, Any]) -> list[TensorInfo]:
    """Cut a tensor that holds all experts, the first dim of its shape, into theirs.  CheckpointError "shape"."""
    count = config.get("num_experts", config.get("num_local_experts"))
    factor = stored.name.endswith(FACTORS)
    fits = len(stored.shape) == 1 if factor else len(stored.shape) > 1
    if not fits or stored.shape[0] != count:
        raise CheckpointError(
            "the tensor does not hold all experts of its layer",
            code="shape",
            file=str(stored.file.path),
            tensor=stored.name,
            expected=f"[{count}{'' if factor else ', ...'}], as expert_count says",
            found=str(list(stored.shape)),
        )
    return [replace(one, shape=one.shape[1:]) for one in _cut(stored, [1] * stored.shape[0])]


def _rows(stored: TensorInfo, names: Sequence[str], config: Mapping[str, Any]) -> list[TensorInfo]:
    """Cut a tensor whose rows several modules share into theirs.  CheckpointError "shape" for too many or few rows.

    The factor of such a tensor is that of each of its parts.
    """
    if len(names) == 1 or stored.name.endswith(FACTORS):
        return [stored] * len(names)
    rows, head_dim = stored.shape[0] if stored.shape else 0, config["head_dim"]
    sizes = [rows // len(names)] * len(names)
    if len(names) == 3:
        query, key = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
        sizes = [query, key, key]
    if sum(sizes) != rows:
        raise CheckpointError(
            "the tensor does not have the rows of all its parts",
            code="shape",
            file=str(stored.file.path),
            tensor=stored.name,
            expected=f"{' + '.join(map(str, sizes))} rows",
            found=f"{counted(rows, 'row')}",
        )
    return _cut(stored, sizes)


def _cut(stored: TensorInfo, sizes: Sequence[int]) -> list[TensorInfo]:
    """Cut a tensor along its first dim, which lies row after row in the file."""
    row, start, parts = stored.nbytes // stored.shape[0], stored.start, []
    for size in sizes:
        shape = (size, *stored.shape[1:])
        parts.append(replace(stored, shape=shape, start=start, end=start + size * row))
        start += size * row
    return parts


@dataclass(frozen=True)
class ChangedTensor(TensorInfo):
    """A tensor that the file's writer changed; `read` undoes it."""

    change: Change

    def read(self, index: tuple[slice, ...] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        rows, *rest = self._bounds(index)
        first = rows[0] // self.change.rows * self.change.rows
        last = -(-rows[1] // self.change.rows) * self.change.rows
        whole = super().read((slice(first, last), *(slice(*bound) for bound in rest)))
        wanted = self.change.restored(whole)[rows[0] - first : rows[1] - first]
        return wanted.contiguous() if out is None else out.copy_(wanted)


def _open_parts(path: Path) -> list[GGUFFile]:
    """Open the file, or all files of a model that is split over several."""
    first = GGUFFile.open(path)
    count, number = (first.metadata.get(f"split.{name}", 0) for name in ("count", "no"))
    if type(count) is not int or type(number) is not int or count <= 1:
        return [first]
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count or int(name["index"]) != number + 1:
        raise CheckpointError(
            f"the file says that it is part {number + 1} of {count} of its model, but does not have that part's name",
            code="split-part",
            file=str(path),
            expected=f"NAME-{number + 1:05d}-of-{count:05d}.gguf",
            fix="Give the model's files the names that they were made with.",
        )
    paths = [path.with_name(f"{name['stem']}-{i + 1:05d}-of-{count:05d}{path.suffix}") for i in range(count)]
    missing = [other.name for other in paths if remote_file(other) is None and not other.exists()]
    if missing:
        head = (
            f"{len(missing)} of {counted(count, 'file of the model is', 'files of the model are')} missing:"
        )
        raise CheckpointError(
            f"{head} {', '.join(missing)}",
            code="shards-missing",
            file=str(path),
            fix="Download the missing files.",
            brief=f"{head} {first_few(missing)}",
        )
    if number != 0:
        raise CheckpointError(
            "this is not the first file of its model",
            code="split-part",
            file=str(path),
            fix=f"Pass {paths[0]}, which has the model's settings.",
        )
    for other in paths[1:]:  # the first one's path is its user's own
        check_link(other)
    files = [first, *(GGUFFile.open(other) for other in paths[1:])]
    for index, file in enumerate(files):
        if (file.metadata.get("split.count"), file.metadata.get("split.no")) != (count, index):
            raise CheckpointError(
                "the file is not the part of the model that its name says",
                code="split-disagrees",
                file=str(file.path),
                expected=f"part {index} of {count}",
                found=f"part {file.metadata.get('split.no')} of {file.metadata.get('split.count')}",
                fix="The files are of different models: download them again.",
            )
    total, announced = sum(len(file.tensors) for file in files), first.metadata.get("split.tensors.count")
    if announced is not None and announced != total:
        raise CheckpointError(
            "the files of the model do not hold as many tensors as the first one announces",
            code="split-disagrees",
            file=str(path),
            expected=f"{counted(announced, 'tensor')}",
            found=str(total),
            fix="The files are of different models: download them again.",
        )
    return files
