"""A machine with several GPUs, as far as torch tells of it, on one that has none."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import torch

from pymllm.gpus import VISIBLE
from pymllm.kernels import hardware


class FakeGPUs:
    """`count` GPUs that only answer questions: each thread has its own current one, at first GPU 0.

    free, reserved, allocated: bytes by number.  asked: (what, number) of each question about one of them, in order.
    """

    def __init__(self, monkeypatch: Any, count: int = 2, memory: int = 80 << 30) -> None:
        self.count, self.total = count, memory
        self.free = [memory // (index + 1) for index in range(count)]
        self.reserved, self.allocated, self.peak = [0] * count, [0] * count, [0] * count
        # Two kinds, so that it shows which one was asked.
        self.capabilities = [(9, 0), (8, 0)]
        self.asked: list[tuple[str, int]] = []
        self._thread = threading.local()
        answers = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "current_device": lambda: self.current,
            "set_device": lambda device: setattr(self._thread, "current", self._index(device)),
            "device": self.device,
            "device_of": lambda tensor: self.device(getattr(tensor, "fake_device", None)),
            "get_device_properties": lambda device=None: self._properties(device),
            "mem_get_info": lambda device=None: (self.free[self._ask("mem_get_info", device)], self.total),
            "memory_reserved": lambda device=None: self.reserved[self._ask("memory_reserved", device)],
            "memory_allocated": lambda device=None: self.allocated[self._ask("memory_allocated", device)],
            "max_memory_allocated": lambda device=None: self.peak[self._ask("max_memory_allocated", device)],
            "reset_peak_memory_stats": lambda device=None: self._ask("reset_peak_memory_stats", device),
            "get_arch_list": lambda: ["sm_80", "sm_86", "sm_90", "sm_120", "compute_120"],
            "synchronize": lambda device=None: self._ask("synchronize", device),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(hardware, "_known_device", hardware._known_device.__wrapped__)
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *VISIBLE):
            monkeypatch.delenv(name, raising=False)

    @property
    def current(self) -> int:
        """The current GPU of the calling thread."""
        return getattr(self._thread, "current", 0)

    @contextlib.contextmanager
    def device(self, device: Any):
        """Make a GPU the current one, as `torch.cuda.device` does; None: none of them."""
        before = self.current
        if device is not None:
            self._thread.current = self._index(device)
        try:
            yield
        finally:
            self._thread.current = before

    def _index(self, device: Any) -> int:
        if isinstance(device, str):
            device = torch.device(device)
        if isinstance(device, torch.device):
            assert device.type == "cuda", device
            device = device.index
        index = self.current if device is None else device
        assert 0 <= index < self.count, f"invalid device ordinal {index}"
        return index

    def _ask(self, what: str, device: Any) -> int:
        index = self._index(device)
        self.asked.append((what, index))
        return index

    def _properties(self, device: Any) -> SimpleNamespace:
        index = self._ask("get_device_properties", device)
        processors = (132, 108)[index % 2]
        major, minor = self.capabilities[index % len(self.capabilities)]
        return SimpleNamespace(
            name=f"Fake {'H' if index % 2 == 0 else 'A'}100 number {index}",
            major=major,
            minor=minor,
            multi_processor_count=processors,
            total_memory=self.total,
            L2_cache_size=50 << 20,
        )
