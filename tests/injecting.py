"""Faults at the Nth call of the system's, or the Nth tensor that is made: a sweep over N finds what gets over none.

`Disk` stands between Python and the files below a folder. Files are opened as `io.open` does it, around a raw file
whose reads and writes are counted one by one, so that buffers, short counts and late errors are what they really are.
`Memory` counts the tensors that torch makes.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

CHANGING = ("create", "write", "sync", "rename", "mkdir", "remove")
READING = ("open", "read", "list", "stat")
KINDS = (*CHANGING, *READING, "close", "lock")

# Gets the kind of call and its path, if it has one; what it returns is the number of bytes that are done, or None.
Fault = Callable[[str, Any], Any]


def error(number: int) -> Fault:
    """Make a fault that is an error of the system's."""

    def fail(kind: str, path: Any) -> None:
        # Calls that have a number of a file, not its name, give no name.
        raise OSError(number, os.strerror(number), *([] if path is None else [os.fspath(path)]))

    return fail


def short(kind: str, path: Any) -> int:
    """Do one byte of what is asked."""
    return 1


def ended(kind: str, path: Any) -> int:
    """Do nothing: a file that ends here, where it is read."""
    return 0


def killed(kind: str, path: Any) -> None:
    """End the process at once, as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Disk:
    """The calls that touch files below `root`.

    kinds: which are counted.  at: the number of the one that fails, from 0; None: none.  fault: what happens there.
    stays: whether all later ones fail likewise, as on a disk that is full.
    calls: the kinds of those that came, in order.  failed: how many of them failed.
    """

    def __init__(
        self,
        root: Path,
        kinds: tuple[str, ...] = KINDS,
        at: int | None = None,
        fault: Fault = error(errno.ENOSPC),  # noqa: B008
        *,
        stays: bool = False,
    ) -> None:
        self.root, self.kinds, self.at, self.fault, self.stays = (
            os.path.realpath(root),
            kinds,
            at,
            fault,
            stays,
        )
        self.calls: list[str] = []
        self.failed = 0
        self._descriptors: set[int] = set()

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.calls)

    def touch(self, kind: str, path: Any = None) -> int | None:
        """Count a call.  Returns how many bytes it does, or None for all; raises what the fault is."""
        if kind not in self.kinds:
            return None
        number = len(self.calls)
        self.calls.append(kind)
        if self.at is None or number < self.at or (number > self.at and not self.stays):
            return None
        self.failed += 1
        return self.fault(kind, path)

    def below(self, path: Any) -> bool:
        """Tell whether a path is one of these."""
        if isinstance(path, int):
            return path in self._descriptors
        try:
            text = os.path.abspath(os.fsdecode(path))
        except TypeError:
            return False
        return text == self.root or text.startswith(self.root + os.sep)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Disk]:
        """Stand in the way for the time of a `with` block."""
        real_open, disk = io.open, self

        class Raw(io.FileIO):
            """A file whose reads and writes are counted."""

            def write(self, data: Any) -> Any:
                most = disk.touch("write")
                return super().write(data if most is None else bytes(data[:most]))

            def truncate(self, size: int | None = None) -> int:
                disk.touch("write")
                return super().truncate(size)

            def readinto(self, buffer: Any) -> Any:
                most = disk.touch("read")
                return super().readinto(buffer if most is None else memoryview(buffer)[:most])

            def read(self, size: int | None = -1) -> Any:
                most = disk.touch("read")
                return super().read(size if most is None else most)

            def readall(self) -> Any:
                # As FileIO does it: reads until one gives nothing.
                parts = []
                while part := self.read(1 << 20):
                    parts.append(part)
                return b"".join(parts)

            def fileno(self) -> int:
                number = super().fileno()
                disk._descriptors.add(number)
                return number

            def close(self) -> None:
                if self.closed:
                    return
                disk._descriptors.discard(super().fileno())
                super().close()
                disk.touch("close")

        def opened(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *more: Any, **rest: Any
        ) -> Any:
            if isinstance(file, int) or not disk.below(file):
                return real_open(file, mode, buffering, encoding, *more, **rest)
            disk.touch("create" if set(mode) & set("wax+") else "open", file)
            binary = mode.replace("b", "").replace("t", "")
            raw = Raw(file, binary)
            if buffering == 0:
                return raw
            kind = (
                io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            )
            buffered = kind(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, *more, **rest)

        def counted(owner: Any, name: str, kind: str) -> Callable[..., Any]:
            real = getattr(owner, name)

            def call(*args: Any, **options: Any) -> Any:
                if kind != "sync" and not any(disk.below(arg) for arg in args[:2]):
                    return real(*args, **options)
                disk.touch(kind, None if isinstance(args[0], int) or hasattr(args[0], "read") else args[0])
                # No power fails here, and to wait for the disk takes most of a test's time.
                return None if kind == "sync" else real(*args, **options)

            return call

        def open_descriptor(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if not disk.below(path):
                return real["open"](path, flags, *args, **options)
            disk.touch("create" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "open", path)
            number = real["open"](path, flags, *args, **options)
            disk._descriptors.add(number)
            return number

        def close_descriptor(number: int) -> None:
            if number in disk._descriptors:
                disk._descriptors.discard(number)
            real["close"](number)

        def read_at(number: int, buffers: list[Any], offset: int, *flags: Any) -> int:
            if number not in disk._descriptors:
                return real["preadv"](number, buffers, offset, *flags)
            most = disk.touch("read")
            if most is not None:
                buffers = [memoryview(buffers[0])[:most]]
            return real["preadv"](number, buffers, offset, *flags) if most != 0 else 0

        real = {name: getattr(os, name) for name in ("open", "close", "preadv")}
        patches: list[tuple[Any, str, Callable[..., Any]]] = [
            (builtins, "open", opened),
            (io, "open", opened),
            (os, "open", open_descriptor),
            (os, "close", close_descriptor),
            (os, "preadv", read_at),
            (fcntl, "flock", counted(fcntl, "flock", "lock")),
        ]
        names = {
            "rename": ("replace", "rename"),
            "mkdir": ("mkdir",),
            "remove": ("unlink", "remove", "rmdir"),
        }
        names |= {"sync": ("fsync",), "list": ("listdir", "scandir"), "stat": ("stat", "lstat")}
        patches += [(os, name, counted(os, name, kind)) for kind, all_ in names.items() for name in all_]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
        for owner, name, patched in patches:
            setattr(owner, name, patched)
        try:
            yield self
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


ALLOCATED = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
)


def no_memory(nbytes: int) -> Exception:
    """Make the error that torch raises on a CPU."""
    return RuntimeError(f"{ALLOCATED}allocate {nbytes} bytes. Error code 12 (Cannot allocate memory)")


class Memory(TorchDispatchMode):
    """The tensors that torch makes in a `with` block.

    at: the number of the one that there is no memory for, from 0; None: there is for all.  stays: or for any later one.
    made: how many there were.  error: makes the error, of the bytes asked for.
    """

    def __init__(
        self, at: int | None = None, *, stays: bool = False, error: Callable[[int], Exception] = no_memory
    ) -> None:
        super().__init__()
        self.at, self.stays, self.error = at, stays, error
        self.made = self.failed = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        returns = func._schema.returns
        if not func._schema.is_mutable and returns and all(one.alias_info is None for one in returns):
            number, self.made = self.made, self.made + 1
            if self.at is not None and (number == self.at or (self.stays and number > self.at)):
                self.failed += 1
                raise self.error(4096)
        return func(*args, **(kwargs or {}))


def open_files() -> set[str]:
    """Return what this process has open, on Linux."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found
