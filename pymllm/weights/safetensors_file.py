"""One safetensors file: its header, checked in full, and exact reads of its tensors.

A file is 8 bytes (the header's length N, little-endian), N bytes of JSON (name -> dtype, shape,
data_offsets), then the tensors' bytes, row-major, one after the other without holes.
"""

from __future__ import annotations

import math
import reprlib
from pathlib import Path
from typing import Any

import torch

from pymllm.errors import CheckpointError, counted
from pymllm.weights.json_text import parse_json_object
from pymllm.weights.links import check_link
from pymllm.weights.tensor_file import (
    TensorFile,
    TensorInfo,
    check_layout,
    check_tensor_name,
    fault,
    open_to_read,
)

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_RANK = 32

# Header dtype -> bits of an element, and torch's dtype; None where torch has no dtype of one element.
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "C64": (64, torch.complex64),
    "I64": (64, torch.int64),
    "I32": (32, torch.int32),
    "I16": (16, torch.int16),
    "I8": (8, torch.int8),
    "U64": (64, torch.uint64),
    "U32": (32, torch.uint32),
    "U16": (16, torch.uint16),
    "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}

_FIELDS = ("dtype", "shape", "data_offsets")


class SafetensorsFile(TensorFile):
    """A safetensors file.  metadata: the strings of the header's `__metadata__` by name."""

    def __init__(
        self, path: Path, identity: tuple[int, int, int], header: dict[str, Any], data_start: int
    ) -> None:
        super().__init__(path, identity)
        self.metadata = _parse_metadata(path, header.pop("__metadata__", {}))
        entries = [_parse_entry(self, name, entry, data_start) for name, entry in header.items()]
        entries.sort(key=lambda info: (info.start, info.end))
        check_layout(path, entries, data_start, identity[2])
        self.tensors = {info.name: info for info in entries}

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Read and check the header.

        Raises CheckpointError; its code is one of: not-found, symlink-loop, not-regular, unreadable, link-escapes;
        header-short, header-length, header-utf8, header-json, header-duplicate-key, header-entry,
        header-dtype, header-metadata; size-overflow, size-mismatch; overlap, hole, offsets-out-of-file,
        trailing-bytes, truncated.
        """
        path = Path(path)
        descriptor = open_to_read(path)
        check_link(path)
        size = descriptor.identity[2]
        if size < 8:
            message = "the file has no room for a header"
            raise fault(path, "header-short", message, "at least 8 bytes", f"{counted(size, 'byte')}")
        length = int.from_bytes(descriptor.read(0, 8), "little")
        limit = min(MAX_HEADER_BYTES, size - 8)
        if not 0 < length <= limit:
            message = f"a file of {counted(size, 'byte')} cannot have a header as long as this one claims"
            raise fault(path, "header-length", message, f"1 to {counted(limit, 'byte')}", f"{length} bytes")
        header = parse_json_object(descriptor.read(8, length), path, "header")
        return cls(path, descriptor.identity, header, 8 + length)


def _parse_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        message = "the header's __metadata__ is not a JSON object of strings"
        raise fault(path, "header-metadata", message, "strings by name", reprlib.repr(metadata))
    return metadata


def _parse_entry(file: SafetensorsFile, name: str, entry: object, data_start: int) -> TensorInfo:
    def bad(code: str, message: str, expected: str, found: str) -> CheckpointError:
        return fault(file.path, code, f"tensor {name!r}: {message}", expected, found, name)

    check_tensor_name(file.path, name, "header-entry")
    if not isinstance(entry, dict) or entry.keys() != set(_FIELDS):
        expected = f"an object of {', '.join(_FIELDS)}"
        raise bad("header-entry", "the header does not describe it", expected, reprlib.repr(entry))
    dtype_name, shape, offsets = (entry[key] for key in _FIELDS)
    if not isinstance(dtype_name, str):
        raise bad("header-entry", "bad dtype", "a string", reprlib.repr(dtype_name))
    if dtype_name not in DTYPES:
        raise bad("header-dtype", "unknown dtype", f"one of {', '.join(DTYPES)}", reprlib.repr(dtype_name))
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise bad(
            "header-entry", "bad shape", f"up to {MAX_RANK} integers of at least 0", reprlib.repr(shape)
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("header-entry", "bad data_offsets", "integers [start, end]", reprlib.repr(offsets))
    bits, dtype = DTYPES[dtype_name]
    # A size of 0 counts as 1 here: torch computes strides from the other dims, which must not overflow either.
    if math.prod(size or 1 for size in shape) * bits >= 1 << 66:
        raise bad("size-overflow", "too large", "less than 2^63 bytes", f"{dtype_name} {reprlib.repr(shape)}")
    (start, end), expected_bits = offsets, math.prod(shape) * bits
    if expected_bits != (end - start) * 8:
        expected = f"{counted(-(-expected_bits // 8), 'byte')} for {dtype_name} {reprlib.repr(shape)}"
        raise bad(
            "size-mismatch", "shape and data_offsets disagree", expected, f"{counted(end - start, 'byte')}"
        )
    return TensorInfo(name, dtype_name, dtype, tuple(shape), file, data_start + start, data_start + end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
