"""The one place that looks at hardware: which device a name means, and what it can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pymllm.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """What kernels may ask about a device.

    type: "cpu" or "cuda" (torch calls AMD's devices so too).  capability: (major, minor) of a GPU.
    isa: the native CPU path in use ("avx512_vnni", ...), or None without native kernels.
    """

    type: str
    name: str
    capability: tuple[int, int] | None = None
    isa: str | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.type)

    def __str__(self) -> str:
        return self.name


@functools.cache
def probe_device(device: str = "auto") -> Device:
    """The device that "auto", "cpu" or "cuda" means here.

    "auto" is the GPU where torch has one, else the CPU.  ConfigError for a device that torch cannot use.
    """
    kind = device.split(":")[0]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        from pymllm.kernels.cpu import native_available, probe

        info = probe()
        return Device("cpu", info.brand, isa=info.best_path if native_available() else None)
    if kind == "cuda" and torch.cuda.is_available():
        return Device("cuda", torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())
    raise ConfigError(
        f"the device {device!r} cannot be used",
        code="device",
        expected="auto, cpu" + (" or cuda" if torch.cuda.is_available() else " (torch sees no GPU)"),
        found=device,
    )
