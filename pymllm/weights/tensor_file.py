"""Tensors in a file, whatever its container: exact reads of named byte ranges.

`TensorFile` is the base of the containers (`safetensors_file`, `gguf_file`): an open file that must stay the one whose
header was read, and `TensorInfo`s, which read themselves, or a slice of themselves, from it.

Bytes are read with preadv straight into the destination, not mapped: a file that shrinks while it is used
gives a CheckpointError instead of SIGBUS, its pages do not count as this process's memory, and threads share nothing.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import reprlib
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pymllm.errors import CheckpointError, counted
from pymllm.weights.links import check_link
from pymllm.weights.remote import RemoteFile, remote_file

MAX_NAME_LENGTH = 1000
MAX_BUFFERS = 1024  # Linux, macOS and the BSDs take no more at a time
MAX_READ_BYTES = 1 << 30  # Linux ends one read at 2^31 - 4096 bytes
BLOCK_BYTES = 4 << 20  # scratch for slices narrower than a page
WIDE_BYTES = 4096  # a segment this long is read by itself: the disk reads whole pages anyway
LONG_ROW_BYTES = 32 << 10  # to copy more bytes than this costs more than one further read, about 1.4 us
STAGE_BYTES = 64 << 20  # scratch for destinations that are on a device or strided in the last dim


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, from its header alone.

    dtype_name: as the header spells it, e.g. "BF16".  torch_dtype: what it is read as; None: it cannot be read.
    shape: in elements of that dtype.  start, end: absolute byte offsets in the file.
    """

    name: str
    dtype_name: str
    torch_dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: TensorFile = field(repr=False)
    start: int
    end: int

    # The stored tensors that it is made of as it is read, where it is not stored itself.
    sources: ClassVar[tuple[TensorInfo, ...]] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype.  Raises CheckpointError "dtype-unsupported" for sub-byte elements such as F4."""
        dtype = self.torch_dtype
        if dtype is None:
            raise CheckpointError(
                f"tensor {self.name!r} has elements that torch cannot hold one by one",
                code="dtype-unsupported",
                file=str(self.file.path),
                tensor=self.name,
                expected="a dtype of whole bytes",
                found=self.dtype_name,
                fix="Convert the checkpoint: store the packed codes as U8.",
            )
        return dtype

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, index: tuple[slice, ...] | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read the tensor, or a slice of it, and only the bytes that this needs.

        index: slices of step 1 within the shape, one for each dim; the last dims may be left out.
        out: is written in place and returned; has the slice's shape, the tensor's dtype, any strides and device.
        Returns [*slice shape].  Rows that adjoin are read as one run; segments under 4 KiB in rows of up to 32 KiB are
        cut out of blocks of whole rows, at most 4 MiB each.

        Raises CheckpointError "truncated" or "changed" if the file is not the one whose header was read,
        "unreadable", "dtype-unsupported"; ValueError for an index or an `out` that does not fit.
        """
        bounds = self._bounds(index)
        shape = tuple(stop - start for start, stop in bounds)
        dtype = self.dtype
        if out is not None and (tuple(out.shape) != shape or out.dtype != dtype or out.is_meta):
            found = f"{out.dtype} {list(out.shape)} on {out.device}"
            raise ValueError(f"{self.name}: cannot read {dtype} {list(shape)} into {found}")
        # The source comes first: a file that shrank is refused before its tensor is allocated.
        source = self.file.source(self)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        if out.numel() == 0:
            return out
        if out.device.type == "cpu" and (out.ndim == 0 or out.stride(-1) == 1):
            target = out.detach().reshape(1) if out.ndim == 0 else out.detach()
            dest = target.view(torch.uint8).numpy()
            width = out.element_size()
            extents, starts = list(self.shape or (1,)), [start for start, _ in bounds] or [0]
            extents[-1], starts[-1] = extents[-1] * width, starts[-1] * width
            _fill(*_merge_dims(dest, extents, starts), self.start, source)
        else:
            self._read_through_stage(bounds, out.detach())
        return out

    def _bounds(self, index: tuple[slice, ...] | None) -> list[tuple[int, int]]:
        """Check the slices of `index`.  Returns (start, stop) for each dim; ValueError for a bad slice."""
        parts = tuple(index or ())
        bounds = []
        for dim, size in enumerate(self.shape):
            part = parts[dim] if dim < len(parts) else slice(None)
            if not isinstance(part, slice) or part.step not in (None, 1):
                raise ValueError(f"{self.name}: {part!r} at dim {dim} is not a slice of step 1")
            start, stop = 0 if part.start is None else part.start, size if part.stop is None else part.stop
            if not 0 <= start <= stop <= size:
                raise ValueError(f"{self.name}: {start}:{stop} at dim {dim} is outside 0:{size}")
            bounds.append((int(start), int(stop)))
        if len(parts) > len(bounds):
            raise ValueError(f"{self.name}: {len(parts)} slices for the shape {list(self.shape)}")
        return bounds

    def _read_through_stage(self, bounds: list[tuple[int, int]], out: torch.Tensor) -> None:
        """Read a slice into scratch of at most STAGE_BYTES and copy it to `out`; halve a larger slice first."""
        sizes = [stop - start for start, stop in bounds]
        dim = next((dim for dim, size in enumerate(sizes) if size > 1), None)
        if dim is None or out.numel() * out.element_size() <= STAGE_BYTES:
            out.copy_(self.read(tuple(slice(*bound) for bound in bounds)))
            return
        start, stop = bounds[dim]
        half = sizes[dim] // 2
        rest = bounds[dim + 1 :]
        self._read_through_stage([*bounds[:dim], (start, start + half), *rest], out.narrow(dim, 0, half))
        self._read_through_stage(
            [*bounds[:dim], (start + half, stop), *rest], out.narrow(dim, half, sizes[dim] - half)
        )


# Fills contiguous uint8 arrays, one after the other, from an absolute offset in the file on.
Source = Callable[[Sequence[np.ndarray], int], None]


def _merge_dims(
    dest: np.ndarray, extents: list[int], starts: list[int]
) -> tuple[np.ndarray, list[int], list[int]]:
    """Describe the same bytes in as few dims as the slice and the strides of `dest` allow.

    dest: [*slice sizes] uint8, stride 1 in the last dim.  extents: the dims' sizes in the file.  starts: where the
    slice starts in each dim.  Returns dest, extents and starts with fewer dims.
    """
    # Innermost first: size, extent, start, stride in dest.
    dims = [(dest.shape[-1], extents[-1], starts[-1], 1)]
    for dim in reversed(range(dest.ndim - 1)):
        size, extent, start, stride = dest.shape[dim], extents[dim], starts[dim], dest.strides[dim]
        inner_size, inner_extent, _, inner_stride = dims[-1]
        if inner_size == inner_extent and (size == 1 or stride == inner_size * inner_stride):
            dims[-1] = (size * inner_size, extent * inner_extent, start * inner_extent, inner_stride)
        elif extent > 1:
            dims.append((size, extent, start, stride))
    dims.reverse()
    merged = np.lib.stride_tricks.as_strided(dest, [dim[0] for dim in dims], [dim[3] for dim in dims])
    return merged, [dim[1] for dim in dims], [dim[2] for dim in dims]


def _fill(dest: np.ndarray, extents: list[int], starts: list[int], offset: int, source: Source) -> None:
    """Read a slice of the row-major bytes at `offset`, of sizes `extents`; the slice begins at `starts`."""
    if dest.ndim == 1:
        source([dest], offset + starts[0])
        return
    rows, row_bytes = dest.shape[0], math.prod(extents[1:])
    offset += starts[0] * row_bytes
    if dest.ndim == 2 and dest.shape[1] == row_bytes and rows > 1:
        source([dest[row] for row in range(rows)], offset)  # they adjoin in the file, not in memory
        return
    if rows == 1 or dest.shape[-1] >= WIDE_BYTES or row_bytes > LONG_ROW_BYTES:
        for row in range(rows):
            _fill(dest[row], extents[1:], starts[1:], offset + row * row_bytes, source)
        return
    rows_per_block = min(rows, BLOCK_BYTES // row_bytes)
    scratch = np.empty(rows_per_block * row_bytes, np.uint8)
    parts = [slice(start, start + size) for start, size in zip(starts, dest.shape, strict=True)]
    cut = (slice(None), *parts[1:])  # the slice's part of a block
    for row in range(0, rows, rows_per_block):
        count = min(rows_per_block, rows - row)
        block = scratch[: count * row_bytes]
        source([block], offset + row * row_bytes)
        dest[row : row + count] = block.reshape(count, *extents[1:])[cut]


class TensorFile:
    """A file whose header has been read and checked; `TensorInfo.read` reads the tensors' bytes.

    path: the file.  identity: device, inode and size when its header was read.  tensors: by name, in file order.
    metadata: what the header holds besides.
    The file is opened again at the first read and stays open until `close`, the end of a `with` block or
    garbage collection; a read after `close` opens it once more.  Any number of threads may read.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]

    def __init__(self, path: Path, identity: tuple[int, int, int]) -> None:
        self.path = path
        self._identity = identity
        self._lock = threading.Lock()
        self._descriptor: Descriptor | None = None
        self._remote = remote_file(path)

    def source(self, tensor: TensorInfo) -> Source:
        """Open the file, unless it is open, and make a function that fills arrays from it on behalf of `tensor`.

        Raises CheckpointError "changed" or "truncated" if the file is not the one whose header was read.
        """
        remote = self._remote
        if remote is not None:
            return lambda arrays, offset: remote.scatter([array.data for array in arrays], offset)
        with self._lock:
            if self._descriptor is None:
                descriptor = Descriptor(self.path)
                if descriptor.identity[:2] != self._identity[:2]:
                    message = "another file took this file's place after its header was read"
                    fix = "Open the checkpoint again."
                    raise fault(self.path, "changed", message, tensor=tensor.name, fix=fix)
                self._descriptor = descriptor
            descriptor = self._descriptor
        expected, found = self._identity[2], os.fstat(descriptor.fd).st_size
        if found != expected:
            raise truncated(self.path, tensor.name, expected, found)
        return lambda arrays, offset: descriptor.scatter(
            [array.data for array in arrays], offset, tensor.name
        )

    def settle(self) -> None:
        """Read on from the downloaded file of one that was remote.  CheckpointError "changed" if it is another."""
        remote = self._remote
        if remote is None:
            return
        descriptor = Descriptor(self.path)
        same = descriptor.identity[2] == remote.size and all(
            hashlib.sha256(descriptor.read(piece.offset, piece.count)).digest() == piece.digest
            for piece in remote.pieces
        )
        if not same:
            message = "the downloaded file is not the one whose header was read on the hub"
            size = f"{descriptor.identity[2]} bytes"
            fix = "Remove the model from the hub's cache (`pymllm rm`), and try again."
            raise fault(self.path, "changed", message, f"{remote.size} bytes", size, fix=fix)
        self._identity, self._remote = descriptor.identity, None

    def close(self) -> None:
        """Release the open file; reads that other threads have begun still finish."""
        with self._lock:
            self._descriptor = None

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {counted(len(self.tensors), 'tensor')})"


class Descriptor:
    """An open regular file.  It closes when its last user lets go of it: never during a read of another thread.

    identity: device, inode and size when it was opened.
    Raises CheckpointError "not-found", "symlink-loop", "not-regular" or "unreadable".
    """

    fd = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Ask before opening: to open a device can have effects.  Open non-blocking: by then it may be a FIFO.
            regular = stat.S_ISREG(os.stat(path).st_mode)
            if regular:
                self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                found = os.fstat(self.fd)
                regular = stat.S_ISREG(found.st_mode)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not regular:
            raise fault(path, "not-regular", "this is not a regular file", "a regular file, or a link to one")
        self.identity = (found.st_dev, found.st_ino, found.st_size)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)

    def read_into(self, buffer: memoryview, offset: int, tensor: str | None = None) -> None:
        """Fill `buffer` (contiguous bytes) from `offset` on.  CheckpointError "truncated" where the file ends first."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.fd, [buffer[done : done + MAX_READ_BYTES]], offset + done)
            except OSError as error:
                raise _unreadable(self.path, error, tensor) from error
            if count == 0:
                raise truncated(self.path, tensor, offset + len(buffer), offset + done)
            done += count

    def scatter(self, buffers: Sequence[memoryview], offset: int, tensor: str | None = None) -> None:
        """Fill buffers, one after the other, from `offset` on, many with one call.  CheckpointError as `read_into`."""
        for first in range(0, len(buffers), MAX_BUFFERS):
            batch = buffers[first : first + MAX_BUFFERS]
            wanted, done = sum(map(len, batch)), 0
            if len(batch) > 1 and wanted <= MAX_READ_BYTES:
                try:
                    done = os.preadv(self.fd, batch, offset)
                except OSError as error:
                    raise _unreadable(self.path, error, tensor) from error
            if done == wanted:
                offset += wanted
                continue
            for buffer in batch:  # what one call has not done
                mine = min(done, len(buffer))
                done -= mine
                self.read_into(buffer[mine:], offset + mine, tensor)
                offset += len(buffer)

    def read(self, offset: int, count: int) -> bytearray:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return buffer


def open_to_read(path: Path) -> Descriptor | RemoteFile:
    """Open a file that lies at `path`, or one of the hub that will."""
    return remote_file(path) or Descriptor(path)


def read_small_file(path: Path, limit: int, what: str) -> bytearray:
    """Read all bytes of a regular file of a checkpoint's folder.

    Raises CheckpointError "<what>-too-large" above `limit` bytes, "link-escapes" for a link that leads elsewhere.
    """
    descriptor = Descriptor(path)
    check_link(path)
    size = descriptor.identity[2]
    if size > limit:
        message = f"the {what} is too large"
        raise fault(path, f"{what}-too-large", message, f"at most {limit} bytes", f"{size} bytes")
    return descriptor.read(0, size)


def check_tensor_name(path: Path, name: str, code: str) -> None:
    """Raise CheckpointError `code` for a tensor name that could flood or steer the terminal which shows it."""
    if not is_plain(name):
        message = f"the tensor name {reprlib.repr(name)} is too long or not printable"
        found = f"{len(name)} characters, {'all' if name.isprintable() else 'not all'} printable"
        raise fault(path, code, message, f"at most {MAX_NAME_LENGTH} printable characters", found)


def is_plain(name: str) -> bool:
    return len(name) <= MAX_NAME_LENGTH and name.isprintable()


def fault(
    path: Path,
    code: str,
    message: str,
    expected: str | None = None,
    found: str | None = None,
    tensor: str | None = None,
    fix: str = "The file is damaged or badly written: download it or convert it again.",
) -> CheckpointError:
    """Make the error for a fault of the file at `path`."""
    return CheckpointError(
        message, code=code, file=str(path), tensor=tensor, expected=expected, found=found, fix=fix
    )


def truncated(path: Path, tensor: str | None, expected: int, found: int) -> CheckpointError:
    """Make the error for a file of another size than its header describes.  expected, found: in bytes."""
    message = "the file does not have the size that its header describes"
    fix = "Download or copy the file again; nothing may write to it while it is used."
    return fault(path, "truncated", message, f"{counted(expected, 'byte')}", f"{found} bytes", tensor, fix)


def _unreadable(path: Path, error: OSError, tensor: str | None = None) -> CheckpointError:
    code = {errno.ENOENT: "not-found", errno.ELOOP: "symlink-loop"}.get(error.errno or 0, "unreadable")
    fix = "Check the path, its links and its permissions."
    return fault(path, code, f"cannot read the file: {error.strerror}", tensor=tensor, fix=fix)


def check_layout(
    path: Path, infos: Sequence[TensorInfo], data_start: int, size: int, alignment: int = 1
) -> None:
    """Raise CheckpointError unless the tensors, sorted by offset, cover the file's data exactly once.

    data_start, size: where the data starts and ends, in bytes.
    alignment: every tensor, and the file, may end with padding to a multiple of it from `data_start`.
    Its code is one of: overlap, hole, offsets-out-of-file, truncated, trailing-bytes.
    """
    end, last = data_start, None
    for info in infos:
        position = data_start + -(-(end - data_start) // alignment) * alignment
        found = f"bytes {info.start} to {info.end}"
        if info.start < position and last is not None:
            message = f"the tensors {last.name!r} and {info.name!r} overlap"
            raise fault(path, "overlap", message, f"a start at {position}", found, info.name)
        if info.start > position:
            code = "hole" if info.end <= size else "offsets-out-of-file"
            message = f"no tensor has the bytes from {position} to {info.start}, where {info.name!r} begins"
            raise fault(path, code, message, f"a start at {position}, an end by {size}", found, info.name)
        end, last = info.end, info
    # In order and without holes, only too long: such is a file that was cut off.
    if end > size:
        cut_off = next(info for info in infos if info.end > size)
        raise truncated(path, cut_off.name, end, size)
    if size - data_start > -(-(end - data_start) // alignment) * alignment:
        message = "the file has bytes after its last tensor"
        raise fault(path, "trailing-bytes", message, f"{counted(end, 'byte')}", f"{size} bytes")
