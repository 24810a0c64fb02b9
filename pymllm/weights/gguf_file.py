"""One GGUF file: its header, checked in full; tensors are read as from any `TensorFile`.

A file is "GGUF", a version (2 or 3), the number of tensors and the number of metadata entries; then the entries (key,
type, value), the tensors' descriptions (name, sizes with the innermost first, type, offset), and the tensors' bytes,
each from a multiple of `general.alignment` on.  Everything is little-endian; a string is its length in 8 bytes, then
UTF-8.

A tensor of a quantised type consists of blocks along its innermost side, of so many values in so many bytes
(`TYPES`).  Here it has the dtype uint8, and its innermost size is in bytes; `dtype_name` says what they mean.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pymllm.errors import CheckpointError, counted
from pymllm.weights.remote import RemoteFile
from pymllm.weights.tensor_file import (
    Descriptor,
    TensorFile,
    TensorInfo,
    check_layout,
    check_tensor_name,
    fault,
    is_plain,
    open_to_read,
)

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # vocabularies of a million tokens take 40 MB
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 20
CHUNK_BYTES = 1 << 20  # of the header, read at a time
REMOTE_SHARE, LEAST_REMOTE_BYTES = 16, 512  # of a hub's file: the part of what was read that may be too much
LEAST_ENTRY_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, rank, one size, type, offset

# Type number -> name, values of a block, bytes of a block, torch's dtype where a block is one value.
TYPES: dict[int, tuple[str, int, int, torch.dtype]] = {
    0: ("F32", 1, 4, torch.float32),
    1: ("F16", 1, 2, torch.float16),
    2: ("Q4_0", 32, 18, torch.uint8),
    3: ("Q4_1", 32, 20, torch.uint8),
    6: ("Q5_0", 32, 22, torch.uint8),
    7: ("Q5_1", 32, 24, torch.uint8),
    8: ("Q8_0", 32, 34, torch.uint8),
    10: ("Q2_K", 256, 84, torch.uint8),
    11: ("Q3_K", 256, 110, torch.uint8),
    12: ("Q4_K", 256, 144, torch.uint8),
    13: ("Q5_K", 256, 176, torch.uint8),
    14: ("Q6_K", 256, 210, torch.uint8),
    16: ("IQ2_XXS", 256, 66, torch.uint8),
    17: ("IQ2_XS", 256, 74, torch.uint8),
    18: ("IQ3_XXS", 256, 98, torch.uint8),
    19: ("IQ1_S", 256, 50, torch.uint8),
    20: ("IQ4_NL", 32, 18, torch.uint8),
    21: ("IQ3_S", 256, 110, torch.uint8),
    22: ("IQ2_S", 256, 82, torch.uint8),
    23: ("IQ4_XS", 256, 136, torch.uint8),
    24: ("I8", 1, 1, torch.int8),
    25: ("I16", 1, 2, torch.int16),
    26: ("I32", 1, 4, torch.int32),
    27: ("I64", 1, 8, torch.int64),
    28: ("F64", 1, 8, torch.float64),
    29: ("IQ1_M", 256, 56, torch.uint8),
    30: ("BF16", 1, 2, torch.bfloat16),
    34: ("TQ1_0", 256, 54, torch.uint8),
    35: ("TQ2_0", 256, 66, torch.uint8),
    39: ("MXFP4", 32, 17, torch.uint8),
    40: ("NVFP4", 64, 36, torch.uint8),
    41: ("Q1_0", 128, 18, torch.uint8),
    42: ("Q2_0", 64, 18, torch.uint8),
}
# Type numbers that no file should hold, and why.
ACTIVATIONS = "llama.cpp makes it of activations and never of weights"
REMOVED = "llama.cpp no longer has it"
REFUSED_TYPES = {
    4: ("Q4_2", REMOVED),
    5: ("Q4_3", REMOVED),
    9: ("Q8_1", ACTIVATIONS),
    15: ("Q8_K", ACTIVATIONS),
    **{31 + i: (f"Q4_0_{layout}", REMOVED) for i, layout in enumerate(("4_4", "4_8", "8_8"))},
    **{36 + i: (f"IQ4_NL_{layout}", REMOVED) for i, layout in enumerate(("4_4", "4_8", "8_8"))},
}

# PrismML's fork had this number first, for larger blocks: values and bytes of one.
Q2_0, EARLIER_Q2_0 = 42, (128, 34)

# Metadata value types.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9


class GGUFFile(TensorFile):
    """A GGUF file.

    metadata: the values of its entries by key; an array is a list of strings, or a numpy array.
    spans: where the type and the value of each entry begin and end in the file, by key.
    """

    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read and check the header.

        Raises CheckpointError; its code is one of: not-found, symlink-loop, not-regular, unreadable;
        header-short, header-magic, header-version, header-length, header-utf8, header-duplicate-key, header-entry,
        header-dtype, header-metadata; size-overflow; overlap, hole, offsets-out-of-file, trailing-bytes, truncated.
        """
        return cls(Path(path), _Header(open_to_read(Path(path))))

    def __init__(self, path: Path, header: _Header) -> None:
        super().__init__(path, header.identity)
        if header.take(4) != MAGIC:
            raise fault(path, "header-magic", "not a GGUF file", repr(MAGIC), repr(bytes(header.buffer[:4])))
        version = header.number("I")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            found = "a big-endian file" if big_endian else f"version {version}"
            raise fault(path, "header-version", "this GGUF cannot be read", "version 2 or 3", found)
        tensors, entries = header.number("Q"), header.number("Q")
        least = tensors * LEAST_TENSOR_BYTES + entries * LEAST_ENTRY_BYTES
        if least > header.limit:
            found = f"{counted(tensors, 'tensor')} and {entries} entries"
            message = "the header announces more tensors and metadata entries than the file has room for"
            raise fault(
                path, "header-length", message, f"at most {counted(header.limit, 'byte')} of header", found
            )
        header.rest = tensors * LEAST_TENSOR_BYTES
        self.spans = {}
        self.metadata = _read_metadata(header, entries, self.spans)
        self.alignment = _alignment(path, self.metadata.get("general.alignment", 32))
        header.certain, header.rest = header.position + header.rest, 0
        described = [_read_tensor(header) for _ in range(tensors)]
        data_start = -(-header.position // self.alignment) * self.alignment
        infos = [self._info(data_start, *entry) for entry in described]
        infos.sort(key=lambda info: (info.start, info.end))
        self._check_layout(infos, data_start, max(header.identity[2], data_start))
        self.tensors = {info.name: info for info in infos}
        if len(self.tensors) < len(infos):
            twice = Counter(info.name for info in infos).most_common(1)[0][0]
            raise fault(
                path, "header-duplicate-key", f"the header has the tensor {twice!r} twice", tensor=twice
            )

    def _check_layout(self, infos: Sequence[TensorInfo], data_start: int, size: int) -> None:
        """Check that the tensors cover the data: see `check_layout`.  infos: sorted by offset.

        "header-dtype": for a file whose Q2_0 fits in the other blocks that had its number before.
        """
        try:
            check_layout(self.path, infos, data_start, size, self.alignment)
        except CheckpointError:
            _, values, nbytes, _ = TYPES[Q2_0]
            earlier = [_in_earlier_blocks(info) for info in infos]
            first = next((old for old, info in zip(earlier, infos, strict=True) if old != info), None)
            if first is None or not _fits(self.path, earlier, data_start, size, self.alignment):
                raise
            raise fault(
                self.path,
                "header-dtype",
                "the file has Q2_0 as a fork of llama.cpp wrote it before llama.cpp had it",
                f"blocks of {counted(values, 'value')} in {nbytes} bytes",
                "blocks of {} values in {} bytes".format(*EARLIER_Q2_0),
                first.name,
                "Convert the model again, with llama.cpp itself.",
            ) from None

    def _info(self, data_start: int, name: str, sizes: Sequence[int], number: int, offset: int) -> TensorInfo:
        """Check a tensor's description and turn it into a `TensorInfo`.

        sizes: in values, the innermost first.  number: of its type.  offset: from `data_start`, in bytes.
        """

        def bad(code: str, message: str, expected: str, found: str) -> CheckpointError:
            return fault(self.path, code, f"tensor {name!r}: {message}", expected, found, name)

        if number not in TYPES:
            known = ", ".join(kind[0] for kind in TYPES.values())
            refused, why = REFUSED_TYPES.get(number, (f"type {number}", ""))
            message = f"a type that files do not have: {why}" if why else "unknown type"
            raise bad("header-dtype", message, f"one of {known}", refused)
        type_name, values, nbytes, dtype = TYPES[number]
        if math.prod(size or 1 for size in sizes) * nbytes >= 1 << 63:
            raise bad("size-overflow", "too large", "less than 2^63 bytes", f"{type_name} {list(sizes)}")
        if 0 in sizes or (values > 1 and not sizes) or (sizes and sizes[0] % values):
            expected = f"rows of whole blocks of {counted(values, 'value')}"
            raise bad("header-entry", "bad sizes", expected, f"{type_name} {list(sizes)}")
        if offset % self.alignment:
            raise bad("header-entry", "bad offset", f"a multiple of {self.alignment}", str(offset))
        shape = tuple(reversed(sizes))
        total = math.prod(shape) // values * nbytes
        if values > 1:
            shape = (*shape[:-1], shape[-1] // values * nbytes)
        start = data_start + offset
        return TensorInfo(name, type_name, dtype, shape, self, start, start + total)


class _Header:
    """The start of a file, read as far as it is asked for.

    position: the index of the next byte.  limit: how many bytes a header may take at most.
    certain, rest: where what is read now ends at the earliest, and how many bytes come behind it at least.
    """

    def __init__(self, descriptor: Descriptor | RemoteFile) -> None:
        self.path, self.identity = descriptor.path, descriptor.identity
        self.limit = min(MAX_HEADER_BYTES, self.identity[2])
        self.buffer = bytearray()
        self.position = 0
        self.certain = self.rest = 0
        self._descriptor = descriptor

    def need(self, count: int) -> int:
        """Read `count` further bytes into the buffer and move past them.  Returns where they begin in it."""
        start, end = self.position, self.position + count
        if end > self.limit:
            short = self.limit < MAX_HEADER_BYTES
            message = "the file ends within its header" if short else "the header is too long"
            code = "header-short" if short else "header-length"
            raise fault(self.path, code, message, f"at least {counted(end, 'byte')}", f"{self.limit} bytes")
        if end > len(self.buffer):
            size = max(end - len(self.buffer), CHUNK_BYTES)
            if isinstance(self._descriptor, RemoteFile):
                # What is certainly wanted, and a little more: no answer may hold many bytes that nobody needs.
                certain = max(end, self.certain + self.rest) - len(self.buffer)
                size = max(certain, len(self.buffer) // REMOTE_SHARE, LEAST_REMOTE_BYTES)
            size = min(size, self.limit - len(self.buffer))
            self.buffer += self._descriptor.read(len(self.buffer), size)
        self.position = end
        return start

    def take(self, count: int) -> bytes:
        start = self.need(count)
        return bytes(self.buffer[start : start + count])

    def number(self, kind: str) -> int:
        """Read an unsigned integer.  kind: struct's "I" (4 bytes) or "Q" (8 bytes)."""
        return int(struct.unpack_from("<" + kind, self.buffer, self.need(struct.calcsize("<" + kind)))[0])

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            message = f"a string of the header is not UTF-8: {error.reason}"
            raise fault(self.path, "header-utf8", message, found=reprlib.repr(raw)) from error

    def strings(self, count: int) -> list[str]:
        """Read `count` strings, one after the other."""
        if count * 8 > self.limit - self.position:
            self.need(count * 8)  # raises the error
        length = struct.Struct("<Q")
        found = []
        self.certain = max(self.certain, self.position + count * 8)
        # There may be hundreds of thousands: strings within the buffer are read without further calls.
        for done in range(count):
            start = self.position + 8
            if start <= len(self.buffer):
                end = start + length.unpack_from(self.buffer, self.position)[0]
                if end <= len(self.buffer):
                    try:
                        found.append(self.buffer[start:end].decode("utf-8"))
                    except UnicodeDecodeError:
                        found.append(self.string())  # raises the error
                    self.position = end
                    continue
            self.certain = self.position + (count - done) * 8
            found.append(self.string())
        return found


def _read_metadata(header: _Header, count: int, spans: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Read `count` entries.  Returns their values by key; `spans` gets where each lies."""
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = header.string()
        if not key or not is_plain(key):
            message = "a metadata key is empty, not printable, or too long"
            raise fault(header.path, "header-metadata", message, found=reprlib.repr(key))
        if key in metadata:
            raise fault(header.path, "header-duplicate-key", f"the header has the metadata key {key!r} twice")
        start = header.position
        metadata[key] = _read_value(header, key, header.number("I"))
        spans[key] = (start, header.position)
    return metadata


def _read_value(header: _Header, key: str, kind: int) -> Any:
    if kind == STRING:
        return header.string()
    if kind != ARRAY:
        value = _read_numbers(header, key, kind, 1)[0]
        return value.item()
    kind, count = header.number("I"), header.number("Q")
    return header.strings(count) if kind == STRING else _read_numbers(header, key, kind, count)


def _read_numbers(header: _Header, key: str, kind: int, count: int) -> np.ndarray:
    dtype = np.dtype(SCALARS.get(kind, "<u1"))
    if kind not in SCALARS and kind != BOOL:
        found = "an array of arrays" if kind == ARRAY else f"type {kind}"
        message = f"the value of the metadata key {key!r} has a type that GGUF does not have here"
        raise fault(header.path, "header-metadata", message, "numbers, booleans or strings", found)
    start = header.need(count * dtype.itemsize)
    values = np.frombuffer(bytes(header.buffer[start : header.position]), dtype)
    if kind == BOOL:
        if values.size and int(values.max()) > 1:
            message = f"the value of the metadata key {key!r} is no boolean"
            raise fault(header.path, "header-metadata", message, "0 or 1", str(values.max()))
        return values.astype(bool)
    return values


def _read_tensor(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Read a tensor's description: its name, sizes, type number and offset."""
    name = header.string()
    check_tensor_name(header.path, name, "header-entry")
    if not name:
        raise fault(header.path, "header-entry", "a tensor of the header has no name")
    rank = header.number("I")
    if rank > MAX_RANK:
        message = f"tensor {name!r}: too many dimensions"
        raise fault(header.path, "header-entry", message, f"at most {MAX_RANK}", str(rank), name)
    sizes = tuple(header.number("Q") for _ in range(rank))
    return name, sizes, header.number("I"), header.number("Q")


def _in_earlier_blocks(info: TensorInfo) -> TensorInfo:
    """Return a tensor of Q2_0 as it would lie in `EARLIER_Q2_0`; any other, or one without whole blocks, as it is."""
    name, values, nbytes, _ = TYPES[Q2_0]
    earlier_values, earlier_bytes = EARLIER_Q2_0
    row = info.shape[-1] // nbytes * values if info.shape else 0
    if info.dtype_name != name or row % earlier_values:
        return info
    count = info.nbytes // nbytes * values // earlier_values
    return replace(info, end=info.start + count * earlier_bytes)


def _fits(path: Path, infos: Sequence[TensorInfo], data_start: int, size: int, alignment: int) -> bool:
    """Tell whether `check_layout` has nothing to say."""
    try:
        check_layout(path, infos, data_start, size, alignment)
    except CheckpointError:
        return False
    return True


def _alignment(path: Path, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        message = "the metadata key 'general.alignment' has no usable value"
        expected = f"a power of two up to {MAX_ALIGNMENT}"
        raise fault(path, "header-metadata", message, expected, reprlib.repr(value))
    return value
