"""The limits of a machine, as probes measure them: how fast memory is read, and how fast a CPU multiplies.

The native probes are in kernels/roofline.cpp. Without them, and on a GPU, torch sums memory up, which may read slower.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from pymllm.kernels.native.extension import native, native_available, probe

PROBE_BYTES = 64 << 20  # read at a time, from a buffer of four times that: beyond the caches
GPU_PROBE_BYTES = 512 << 20


class ReadProbe:
    """A probe of the bandwidth of cold memory: every read takes the next part of a buffer larger than the caches."""

    def __init__(self, *, huge: bool, bytes_at_a_time: int = PROBE_BYTES) -> None:
        self.size = bytes_at_a_time
        self.buffer = torch.empty(4 * self.size, dtype=torch.uint8)
        native().roofline_pages(self.buffer.data_ptr(), self.buffer.nbytes, huge)
        self.buffer.fill_(1)
        self.turn = 0

    def __call__(self, streams: int, threads: int) -> float:
        """Measure the bytes per second."""
        self.turn = (self.turn + 1) % 4
        address = self.buffer.data_ptr() + self.turn * self.size
        return float(self.size / native().roofline_read(address, self.size, streams, threads))


class TorchReadProbe:
    """A probe that lets torch sum memory up, with torch's own number of threads, or on a GPU."""

    def __init__(self, device: torch.device) -> None:
        size = PROBE_BYTES if device.type == "cpu" else GPU_PROBE_BYTES
        self.parts = torch.ones(4, size // 4, dtype=torch.float32, device=device)
        self.turn = 0

    def __call__(self) -> float:
        """Measure the bytes per second."""
        self.turn = (self.turn + 1) % 4
        part = self.parts[self.turn]
        settle(part.device)
        started = time.perf_counter()
        part.sum()
        settle(part.device)
        return part.nbytes / (time.perf_counter() - started)


def settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked to do; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """Describe where and with what a result was measured."""
    cpu = probe()
    return {
        "cpu": cpu.brand,
        "logical_cpus": cpu.logical_cpus,
        "path": cpu.best_path,
        "l2_bytes": cpu.l2_bytes,
        "l3_bytes": cpu.l3_bytes,
        "huge_pages": cpu.transparent_huge_pages,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": load_average(),
    }


def load_average() -> float | None:
    """Return how many processes wanted a CPU in the last minute, on average; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Limits:
    """The limits of the device that a model runs on, for torch's number of threads.  The best of all probes counts.

    Memory of a probe is taken while it is there: delete it when no more is to be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.native = device.type == "cpu" and native_available()
        self._huge = ReadProbe(huge=True) if self.native else None
        self._torch = None if self.native else TorchReadProbe(device)
        self._reads: dict[int, list[float]] = {}
        self._rates: dict[int, dict[str, float]] = {}

    def probe(self) -> None:
        """Measure once more, now."""
        threads = torch.get_num_threads()
        reads = self._reads.setdefault(threads, [])
        if self._torch is not None:
            reads.append(self._torch())
            return
        assert self._huge is not None
        reads.append(max(self._huge(8, threads) for _ in range(2)))
        rates = self._rates.setdefault(threads, {"float32": 0.0, "int8": 0.0})
        for name, measured in (
            ("float32", native().roofline_f32(threads)),
            ("int8", native().roofline_int8(threads)),
        ):
            rates[name] = max(rates[name], measured)

    def read_rate(self, threads: int) -> float:
        """Return the bytes a second that so many threads read."""
        return max(self._reads[threads])

    def operations(self, threads: int) -> dict[str, float] | None:
        """Return the operations a second of "float32" and "int8", a multiply-add being two; None: nobody knows."""
        return self._rates.get(threads)
