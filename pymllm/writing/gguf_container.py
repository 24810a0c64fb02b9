"""The container of a GGUF file, written: its header from metadata and tensors, then the tensors' bytes, copied.

The layout: `pymllm/weights/gguf_file.py`, which reads it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pymllm.errors import ConfigError, counted
from pymllm.weights.gguf_file import ARRAY, BOOL, MAGIC, SCALARS, STRING, TYPES, VERSIONS

ALIGNMENT = 32
NUMBERS = {name: number for number, (name, *_) in TYPES.items()}
KINDS = {np.dtype(dtype): number for number, dtype in SCALARS.items()}
Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.  type: its name in `TYPES`.  shape: in values, the outermost size first."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        _, values, size, _ = TYPES[NUMBERS[self.type]]
        return math.prod(self.shape) // values * size

    @property
    def padded(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Encoded:
    """A metadata value that is encoded already: its type and its bytes, as another file has them."""

    raw: bytes


def header(metadata: Metadata, tensors: Sequence[FileTensor]) -> bytes:
    """Write a header, with what fills it up to the first tensor.

    metadata: strings, booleans, integers, floats, lists of strings, numpy arrays, or what is `Encoded`.
    tensors: in the order in which their bytes follow.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        parts.append(struct.pack("<IQ", NUMBERS[tensor.type], offset))
        offset += tensor.padded
    raw = b"".join(parts)
    return raw + b"\0" * (-len(raw) % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Encode a value with its type.  Integers take 4 bytes where they fit."""
    if isinstance(value, Encoded):
        return value.raw
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int):
        dtype = "<u4" if 0 <= value < 1 << 32 else "<i4" if -(1 << 31) <= value < 0 else "<i8"
        return struct.pack("<I", KINDS[np.dtype(dtype)]) + np.array(value, dtype).tobytes()
    if isinstance(value, float):
        return struct.pack("<If", KINDS[np.dtype("<f4")], value)
    if isinstance(value, np.ndarray):
        kind = BOOL if value.dtype == bool else KINDS[value.dtype]
        return struct.pack("<IIQ", ARRAY, kind, value.size) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def encoded_metadata(path: Path, spans: Mapping[str, tuple[int, int]]) -> dict[str, Encoded]:
    """Read the entries of another file as they are encoded there.  spans: of its `GGUFFile`."""
    with open(path, "rb") as file:

        def read(start: int, end: int) -> Encoded:
            file.seek(start)
            return Encoded(file.read(end - start))

        return {key: read(*span) for key, span in spans.items()}


def padded(chunks: Iterator[bytes | memoryview], tensor: FileTensor) -> Iterator[bytes | memoryview]:
    """Yield a tensor's bytes and what fills them up.  ConfigError if they are not as many as the header says."""
    count = 0
    for chunk in chunks:
        count += len(chunk)
        yield chunk
    if count != tensor.nbytes:
        raise ConfigError(
            "a tensor has not the size that was planned for it",
            code="spelling",
            tensor=tensor.name,
            expected=f"{counted(tensor.nbytes, 'byte')} of {tensor.type} {list(tensor.shape)}",
            found=f"{counted(count, 'byte')}",
        )
    yield b"\0" * (tensor.padded - count)
