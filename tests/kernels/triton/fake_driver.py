"""A driver for Triton without a GPU: kernels are compiled for real, and launches are kept instead of made.

It cannot say what the driver of a GPU costs, or whether a kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as drivers

SHARED_BYTES = 232448  # of a block, on sm_90


@dataclass(frozen=True)
class Launched:
    """What a launcher was given.  arguments: as the driver reads them, a tensor being its address."""

    grid: tuple[int, int, int]
    stream: int
    function: object
    metadata: object
    watchers: tuple[object, object, object]
    arguments: tuple[Any, ...]


class FakeUtils:
    """The part of a driver that loads binaries.

    loaded: those that were.  shared_bytes: what a block may use.  threads: the most that a loaded kernel may have.
    """

    def __init__(self, shared_bytes: int) -> None:
        self.shared_bytes, self.threads = shared_bytes, 1024
        self.loaded: list[str] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared_bytes, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert kernel, "a binary that is compiled"
        self.loaded.append(name)
        return "module", f"{name} {len(self.loaded)}", 32, 0, self.threads


class FakeDriver(DriverBase):
    """A driver of GPUs that are not here.

    target: what is compiled for.  launches: what was launched, in order; None: launches are forgotten.
    device: the current one.  Each device has a stream of its own.
    """

    def __init__(self, target: GPUTarget, shared_bytes: int = SHARED_BYTES) -> None:
        super().__init__()
        self.target, self.device, self.utils = target, 0, FakeUtils(shared_bytes)
        self.launches: list[Launched] | None = []

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is nothing to time")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Make what launches one compiled kernel."""

        def launch(*given: Any) -> None:
            if self.launches is None:
                return
            grid, (stream, function, packed), watchers, arguments = (
                given[:3],
                given[3:6],
                given[6:9],
                given[9:],
            )
            read = tuple(
                value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments
            )
            self.launches.append(Launched(grid, stream, function, packed, watchers, read))

        return launch


@contextmanager
def fake_driver(
    backend: str = "cuda", architecture: int | str = 90, shared_bytes: int = SHARED_BYTES
) -> Iterator[FakeDriver]:
    """Let Triton drive GPUs that are not here, within the block."""
    from triton.compiler import compiler

    driver = FakeDriver(GPUTarget(backend, architecture, 32 if backend == "cuda" else 64), shared_bytes)
    before = drivers._active
    drivers.set_active(driver)
    compiler.max_shared_mem.cache_clear()
    try:
        yield driver
    finally:
        drivers._active = before
        compiler.max_shared_mem.cache_clear()


class OnDevice(torch.Tensor):
    """A tensor in the CPU's memory that says it is on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    is_cpu = False

    @staticmethod
    def of(tensor: torch.Tensor) -> OnDevice:
        return tensor.as_subclass(OnDevice)

    def get_device(self) -> int:
        return 0
