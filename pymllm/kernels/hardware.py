"""The one place that looks at hardware: it finds the device that a name means, and says what the device can do."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from pymllm.errors import ConfigError, nearest, unknown_name


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture that kernels are built for.

    processors: multiprocessors of its usual board, for a device that is known by its architecture's name alone.
    shared_bytes: shared memory that one block may use.  fp8: whether its matrix units multiply float8_e4m3fn.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    fp8: bool

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm")

    @property
    def spec(self) -> str:
        """The name by which `probe_device` makes a device of this architecture."""
        return f"{'cuda' if self.is_nvidia else 'hip'}:{self.name}"


# Shared memory: CUDA C programming guide, "Technical specifications per compute capability"; CDNA ISA guides (LDS).
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm80", (8, 0), 108, 166912, fp8=False),
        Architecture("sm86", (8, 6), 84, 101376, fp8=False),
        Architecture("sm89", (8, 9), 128, 101376, fp8=True),
        Architecture("sm90", (9, 0), 132, 232448, fp8=True),
        Architecture("sm100", (10, 0), 148, 232448, fp8=True),
        Architecture("sm120", (12, 0), 170, 101376, fp8=True),
        Architecture("gfx90a", (9, 0), 104, 65536, fp8=False),
        # fp8=False: gfx942's fp8 is e4m3fnuz, which no checkpoint has.
        Architecture("gfx942", (9, 4), 304, 65536, fp8=False),
        Architecture("gfx950", (9, 5), 256, 163840, fp8=True),
    )
}


@dataclass(frozen=True)
class Device:
    """A device, as far as kernels may ask about it.

    type: "cpu" or "cuda" (torch calls AMD's devices "cuda" too).  capability: (major, minor) of a GPU.
    isa: the native CPU path in use ("avx512_vnni", ...), or None without native kernels.
    architecture: that of a GPU which pymllm's own GPU kernels are built for.  processors: a GPU's multiprocessors.
    present: False for a device known by its architecture's name alone, which can be planned for but not run on.
    """

    type: str
    name: str
    capability: tuple[int, int] | None = None
    isa: str | None = None
    architecture: Architecture | None = None
    processors: int = 0
    present: bool = True

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.type)

    @property
    def spec(self) -> str:
        """The name by which `probe_device` makes this device."""
        return self.type if self.present or self.architecture is None else self.architecture.spec

    def __hash__(self) -> int:
        return hash((self.type, self.name))  # kernels look tiles up by it at every launch

    def __str__(self) -> str:
        return self.name


@functools.cache
def probe_device(device: str = "auto") -> Device:
    """Find the device that a name means on this machine.

    device: "auto" (the GPU where torch has one, else the CPU), "cpu" or "cuda"; or, for a plan, the name of an
    architecture such as "cuda:sm90" or "hip:gfx942", which means any GPU of it.
    Raises ConfigError "device" for a device that torch cannot use, or an unknown architecture.
    """
    kind, _, which = device.partition(":")
    if kind in ("cuda", "hip") and which and not which.isdecimal():
        return _named_device(device, which)
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        from pymllm.kernels.native.extension import native_available, probe

        info = probe()
        return Device("cpu", info.brand, isa=info.best_path if native_available() else None)
    if kind == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        return Device(
            "cuda",
            properties.name,
            capability=(properties.major, properties.minor),
            architecture=_architecture_of(properties),
            processors=properties.multi_processor_count,
        )
    raise ConfigError(
        f"torch cannot use the device {device!r} on this machine",
        code="device",
        expected="auto, cpu" + (" or cuda" if torch.cuda.is_available() else " (torch sees no GPU)"),
        found=device,
        fix="A GPU is called cuda here." if kind == "gpu" else nearest(kind.lower(), ("auto", "cpu", "cuda")),
    )


def _named_device(device: str, which: str) -> Device:
    architecture = ARCHITECTURES.get(which)
    if architecture is None or architecture.spec != device:
        names = [known.spec for known in ARCHITECTURES.values()]
        raise unknown_name("architecture", device, names, code="device")
    return Device(
        "cuda",
        f"a GPU of architecture {which}",
        capability=architecture.capability,
        architecture=architecture,
        processors=architecture.processors,
        present=False,
    )


def _architecture_of(properties: object) -> Architecture | None:
    """Find the architecture whose kernels a GPU runs.  None: the GPU is older than all of them."""
    gfx = getattr(properties, "gcnArchName", "").split(":")[0]
    if torch.version.hip is not None:
        return ARCHITECTURES.get(gfx)
    capability = (properties.major, properties.minor)  # type: ignore[attr-defined]
    nvidia = [a for a in ARCHITECTURES.values() if a.is_nvidia]
    usable = [a for a in nvidia if a.capability[0] == capability[0] and a.capability <= capability]
    return max(usable, key=lambda a: a.capability, default=None)
