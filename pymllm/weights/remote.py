"""Files of a hub that are not downloaded yet: what a plan needs of them is read by exact HTTP ranges.

A remote file has the path where it will lie. `Descriptor`'s users open it as they would open that file; after the
download, `TensorFile.settle` finds out whether the file is the one that was read.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pymllm.errors import CheckpointError, PymllmError

TIMEOUT = 30  # seconds without a byte
RETRIES = 3  # of requests that fail in passing
LONGEST_SKIP = 1 << 20  # what is read in vain of a server that ignores ranges
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True)
class Piece:
    """Bytes that were read: where they begin, how many they are, and their digest."""

    offset: int
    count: int
    digest: bytes


@dataclass
class RemoteFile:
    """A file of a hub, read by ranges as a `Descriptor` reads.

    path: where it lies once it is downloaded.  name: in its repository.  url: of the very commit.
    revision: as it was asked for.  identity: 0, 0 and the size in bytes.  pieces: what was read.
    """

    path: Path
    name: str
    repo: str
    commit: str
    url: str
    size: int
    revision: str | None = None
    pieces: list[Piece] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def identity(self) -> tuple[int, int, int]:
        return (0, 0, self.size)

    def read(self, offset: int, count: int) -> bytearray:
        """Read exactly `count` bytes.  CheckpointError "range" for an answer that does not hold just these."""
        raw = self._ask(offset, count) if count else bytearray()
        with self.lock:
            self.pieces.append(Piece(offset, count, hashlib.sha256(raw).digest()))
        return raw

    def read_into(self, buffer: memoryview, offset: int, tensor: str | None = None) -> None:
        """Fill `buffer` from `offset` on, as `Descriptor.read_into`."""
        self.scatter([buffer], offset)

    def scatter(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill buffers (contiguous), one after the other, from `offset` on."""
        raw, done = memoryview(self.read(offset, sum(buffer.nbytes for buffer in buffers))), 0
        for buffer in buffers:
            buffer.cast("B")[:] = raw[done : done + buffer.nbytes]
            done += buffer.nbytes

    def _ask(self, offset: int, count: int) -> bytearray:
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        from pymllm.weights.hub_errors import hub_failures, refused

        last = offset + count - 1
        # Compressed bytes would be others than those of the range.
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{last}", "Accept-Encoding": "identity"}
        raw = bytearray()
        try:
            with http_stream_backoff(
                "GET", self.url, max_retries=RETRIES, headers=headers, follow_redirects=True, timeout=TIMEOUT
            ) as answer:
                if answer.status_code == 416:
                    raise self._fault(f"bytes {offset} to {last}", "a file that ends before")
                hf_raise_for_status(answer)
                skip = self._check(answer.status_code, answer.headers.get("Content-Range"), offset, last)
                for chunk in answer.iter_raw(1 << 16):
                    raw += chunk
                    if len(raw) > skip + count:
                        break
        except PymllmError:
            raise
        except hub_failures() as error:
            raise refused(f"{self.repo}/{self.name}", error) from error
        whole = answer.status_code == 200
        if len(raw) < skip + count or (len(raw) > count and not whole):
            raise self._fault(f"{count} bytes", f"{'more' if len(raw) > count else len(raw)} bytes")
        return raw[skip : skip + count]

    def _check(self, status: int, said: str | None, offset: int, last: int) -> int:
        """Check an answer's head.  Returns how many of its bytes lie before those that were asked for."""
        if status == 200:
            if last >= LONGEST_SKIP and last + 1 < self.size:
                raise self._fault(f"bytes {offset} to {last}", "the whole file: the server ignores ranges")
            return offset
        match = RANGE.fullmatch(said or "")
        if status != 206 or match is None or (int(match[1]), int(match[2])) != (offset, last):
            raise self._fault(f"bytes {offset} to {last} of {self.size}", said or f"status {status}")
        if match[3] not in ("*", str(self.size)):
            raise self._fault(f"a file of {self.size} bytes", f"one of {match[3]} bytes")
        return 0

    def _fault(self, expected: str, found: str) -> CheckpointError:
        return CheckpointError(
            "the hub's answer does not hold the part of the file that was asked for",
            code="range",
            file=f"{self.repo}/{self.name}",
            expected=expected,
            found=found,
            fix="Try again; if it stays, download the model first (`hf download`) and pass its folder.",
        )


_REMOTE: dict[Path, RemoteFile] = {}


def register(file: RemoteFile) -> None:
    """Have `remote_file` find this file by its path until it is downloaded."""
    _REMOTE[file.path] = file


def remote_file(path: Path) -> RemoteFile | None:
    """Find the file of a hub that is to lie at `path`; None where a file lies there, or none is to."""
    found = _REMOTE.get(path)
    return None if found is None or os.path.exists(path) else found


def remote_files(folder: Path) -> list[RemoteFile]:
    """List the files that are to lie in a folder, or within it, and do not yet."""
    return [
        file for path, file in _REMOTE.items() if folder in path.parents and remote_file(path) is not None
    ]


def remote_names(folder: Path) -> list[str]:
    """List the names of the files that are to lie in a folder and do not yet."""
    return [path.name for path in _REMOTE if path.parent == folder and remote_file(path) is not None]
