"""A file of raw tensors that is mapped into memory, every byte of it checked first.

    8 bytes   MAGIC
    8 bytes   the length of the header, little-endian
    header    JSON, in ASCII; then its SHA-256, 32 bytes
    data      storages, each at a multiple of ALIGNED bytes

The header has the key under which the file was kept; `storages`: offset, bytes and sums of each; `tensors`: storage,
offset in elements, dtype, shape and strides of each; and `account`, which is the caller's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.disk import write_whole
from pymllm.kernels.native.extension import native

MAGIC = b"pymllmP1"
ALIGNED = 4096
CHUNK = 16 << 20  # bytes that are summed together
LONGEST_HEADER = 256 << 20


class UnfitError(Exception):
    """A file that cannot be used, and why."""


def sums_of(pieces: Sequence[Tensor], threads: int) -> list[str]:
    """Return the digest of the sums of each of these bytes, CHUNK by CHUNK.  pieces: 1-D uint8 tensors on the CPU."""
    chunks = [
        (piece.data_ptr() + at, min(CHUNK, piece.numel() - at), index)
        for index, piece in enumerate(pieces)
        for at in range(0, piece.numel(), CHUNK)
    ]
    digests = [hashlib.sha256(str(piece.numel()).encode()) for piece in pieces]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for (_, _, index), found in zip(
            chunks, pool.map(lambda c: native().lane_sums(c[0], c[1]), chunks), strict=True
        ):
            digests[index].update(found)
    return [digest.hexdigest()[:32] for digest in digests]


def write_packed(path: Path, key: str, tensors: Sequence[Tensor], account: Any, threads: int) -> int:
    """Write tensors, and what else there is to say.  Returns the bytes of the file.  ConfigError as `write_whole`.

    A storage that several of them share is written once.
    """
    storages: list[Tensor] = []
    known: dict[int, int] = {}
    listed = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        index = known.get(storage._cdata)
        if index is None:
            index = known[storage._cdata] = len(storages)
            storages.append(torch.empty(0, dtype=torch.uint8).set_(storage))
        dtype = str(tensor.dtype).removeprefix("torch.")
        listed.append([index, tensor.storage_offset(), dtype, list(tensor.shape), list(tensor.stride())])
    places, at = [], 0
    for piece, digest in zip(storages, sums_of(storages, threads), strict=True):
        places.append([at, piece.numel(), digest])
        at += -(-piece.numel() // ALIGNED) * ALIGNED
    header = json.dumps({"key": key, "storages": places, "tensors": listed, "account": account}).encode()
    head = MAGIC + len(header).to_bytes(8, "little") + header + hashlib.sha256(header).digest()

    def chunks() -> Iterator[bytes | memoryview]:
        yield head + bytes(-len(head) % ALIGNED)
        for piece in storages:
            data = memoryview(piece.numpy())  # type: ignore[arg-type]
            for start in range(0, len(data), CHUNK):
                yield data[start : start + CHUNK]
            yield bytes(-len(data) % ALIGNED)

    total = -(-len(head) // ALIGNED) * ALIGNED + at
    # Not on the disk at once: what is lost with the machine's power is found by its sums.
    write_whole(path, chunks(), total, sync=False)
    return total


def read_header(path: Path, key: str | None = None) -> tuple[dict[str, Any], int]:
    """Read and check a file's header.  Returns it, and where it ends.  UnfitError says what is wrong."""
    with _opened(path) as descriptor:
        return _header(descriptor, key)


def map_packed(path: Path, key: str, threads: int) -> tuple[list[Tensor], Any]:
    """Map a file, and check every byte.  Returns its tensors and its account.  UnfitError says what is wrong.

    The mapping is private: what is written to a tensor never reaches the file.
    """
    with _opened(path) as descriptor:
        header, length = _header(descriptor, key)
        start = -(-length // ALIGNED) * ALIGNED
        places = header["storages"]
        end = start + sum(-(-nbytes // ALIGNED) * ALIGNED for _, nbytes, _ in places)
        size = os.fstat(descriptor).st_size
        if size != end:
            raise UnfitError(f"it has {size} bytes, not {end}")
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        memory.madvise(mmap.MADV_WILLNEED)
    pieces = [whole[start + at : start + at + nbytes] for at, nbytes, _ in places]
    _populate(memory, threads)
    gaps = [
        whole[length:start],
        *(
            whole[start + at + nbytes : start + at + -(-nbytes // ALIGNED) * ALIGNED]
            for at, nbytes, _ in places
        ),
    ]
    if any(bool(gap.any()) for gap in gaps if gap.numel()):
        raise UnfitError("there is something between its tensors")
    for index, (found, (_, _, wanted)) in enumerate(zip(sums_of(pieces, threads), places, strict=True)):
        if found != wanted:
            raise UnfitError(f"its bytes are not those that were written (storage {index})")
    tensors = []
    for index, offset, dtype, shape, strides in header["tensors"]:
        kind = getattr(torch, dtype)
        # A storage of its own, which is no larger than what was written.
        piece = pieces[index]
        if piece.numel() == 0:
            tensors.append(torch.empty(shape, dtype=kind).as_strided(shape, strides))
            continue
        tensors.append(
            _at(memory, start + places[index][0], piece.numel(), kind).as_strided(shape, strides, offset)
        )
    return tensors, header["account"]


def _at(memory: mmap.mmap, offset: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """Return a storage of the mapping as one row of elements."""
    count = nbytes // dtype.itemsize
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def _populate(memory: mmap.mmap, threads: int) -> None:
    """Map all pages at once, where the system can: one by one they cost a fault each."""
    populate_read = 22  # MADV_POPULATE_READ of Linux 5.14
    part = max(CHUNK, -(-len(memory) // max(threads, 1) // ALIGNED) * ALIGNED)

    def one(start: int) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            memory.madvise(populate_read, start, min(part, len(memory) - start))

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(one, range(0, len(memory), part)))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file that is this user's alone.  UnfitError for another's, and for one that others may write."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise UnfitError(error.strerror or str(error)) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UnfitError("it is no file")
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            raise UnfitError(f"it belongs to user {found.st_uid}")
        if found.st_mode & 0o022:
            raise UnfitError("other users may write to it")
        yield descriptor
    finally:
        os.close(descriptor)


def _header(descriptor: int, key: str | None) -> tuple[dict[str, Any], int]:
    head = os.pread(descriptor, 16, 0)
    length = int.from_bytes(head[8:], "little")
    if len(head) < 16 or head[:8] != MAGIC or length > LONGEST_HEADER:
        raise UnfitError("it does not begin as such a file does")
    body = os.pread(descriptor, length + 32, 16)
    if len(body) != length + 32 or hashlib.sha256(body[:length]).digest() != body[length:]:
        raise UnfitError("its header is damaged")
    header: dict[str, Any] = json.loads(body[:length])
    if key is not None and header["key"] != key:
        raise UnfitError("it was kept of other files, or by another version or machine")
    return header, 16 + len(body)
