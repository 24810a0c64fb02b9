"""The container of a safetensors file, written: its header, then the tensors' bytes, widest elements first.

The layout: `pymllm/weights/safetensors_file.py`, which reads it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymllm.disk import write_whole
from pymllm.weights.safetensors_file import DTYPES, SafetensorsFile
from pymllm.weights.tensor_file import TensorInfo

COPY_BYTES = 16 << 20
NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written.  dtype: as headers spell it.  chunks: makes its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, again: str = ""
) -> None:
    """Write tensors, which are on the CPU, into a file that appears whole.

    metadata: strings by name.  again: see `pymllm.disk`.  ConfigError if the file cannot be written.
    """
    entries = [
        _Entry(name, NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, lambda t=tensor: _bytes_of(t))  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]
    _write(path, entries, dict(metadata or {}), again)


def join_tensors(folder: Path, shard: Sequence[Sequence[str]], path: Path, again: str = "") -> None:
    """Copy tensors of files into one.

    shard: [name, file in `folder`] of each.  again: as for `write_tensors`.
    ConfigError likewise; CheckpointError for a file that cannot be read.
    """
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsFile.open(folder / name)) for name in {f for _, f in shard}
        }
        infos = [files[file].tensors[name] for name, file in shard]
        entries = [
            _Entry(info.name, info.dtype_name, info.shape, info.nbytes, lambda i=info: chunks_of(i))  # type: ignore[misc]
            for info in infos
        ]
        _write(path, entries, {"format": "pt"}, again)


def chunks_of(info: TensorInfo) -> Iterator[memoryview]:
    """Yield the bytes of a tensor as they lie in its file.  CheckpointError as `TensorInfo.read` raises it."""
    source = info.file.source(info)
    for start in range(info.start, info.end, COPY_BYTES):
        chunk = np.empty(min(COPY_BYTES, info.end - start), np.uint8)
        source([chunk], start)
        yield chunk.data


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, entries: list[_Entry], metadata: dict[str, str], again: str) -> None:
    # Widest elements first, so that all are aligned.
    entries = sorted(entries, key=lambda entry: -DTYPES[entry.dtype][0])
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield len(raw).to_bytes(8, "little") + raw
        for entry in entries:
            yield from entry.chunks()

    write_whole(path, chunks(), 8 + len(raw) + position, again=again)
