"""The one place that looks at hardware: it finds the device that a name means, and says what the device can do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pymllm.errors import ConfigError, nearest, unknown_name
from pymllm.gpus import count_gpus, describe_gpus, named_gpu, own_gpu, why_torch_cannot

Method = TypeVar("Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Architecture:
    """A GPU architecture that kernels are built for.

    processors: multiprocessors of its usual board, for a device that is known by its architecture's name alone.
    shared_bytes: shared memory that one block may use.  cache_bytes: of that board's last cache before memory, which
    all multiprocessors see.  fp8: whether its matrix units multiply float8_e4m3fn.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    cache_bytes: int
    fp8: bool

    @property
    def is_nvidia(self) -> bool:
        return self.name.startswith("sm")

    @property
    def spec(self) -> str:
        """The name by which `probe_device` makes a device of this architecture."""
        return f"{'cuda' if self.is_nvidia else 'hip'}:{self.name}"


# Shared memory: CUDA C programming guide, "Technical specifications per compute capability"; CDNA ISA guides (LDS).
# Caches: whitepapers of the A100, GA102 (the A10's is as large), AD102 (RTX 4090), H100, B200 and RTX 5090; AMD's of
# CDNA 2 (L2 of one die of an MI250), CDNA 3 and CDNA 4 (Infinity Cache: each of the L2s serves but one die).
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("sm80", (8, 0), 108, 166912, 40 << 20, fp8=False),
        Architecture("sm86", (8, 6), 84, 101376, 6 << 20, fp8=False),
        Architecture("sm89", (8, 9), 128, 101376, 72 << 20, fp8=True),
        Architecture("sm90", (9, 0), 132, 232448, 50 << 20, fp8=True),
        Architecture("sm100", (10, 0), 148, 232448, 126 << 20, fp8=True),
        Architecture("sm120", (12, 0), 170, 101376, 96 << 20, fp8=True),
        Architecture("gfx90a", (9, 0), 104, 65536, 8 << 20, fp8=False),
        # fp8=False: gfx942's fp8 is e4m3fnuz, which no checkpoint has.
        Architecture("gfx942", (9, 4), 304, 65536, 256 << 20, fp8=False),
        Architecture("gfx950", (9, 5), 256, 163840, 256 << 20, fp8=True),
    )
}


@dataclass(frozen=True)
class Device:
    """A device, as far as kernels may ask about it.

    type: "cpu" or "cuda" (torch calls AMD's devices "cuda" too).  capability: (major, minor) of a GPU.
    isa: the native CPU path in use ("avx512_vnni", ...), or None without native kernels.
    architecture: that of a GPU which pymllm's own GPU kernels are built for.  processors: a GPU's multiprocessors.
    cache_bytes: of its last cache before memory, which all of them see.
    present: False for a device known by its architecture's name alone, which can be planned for but not run on.
    index: the number of a GPU that is present.  memory: a GPU's bytes; 0: they are not known.
    """

    type: str
    name: str
    capability: tuple[int, int] | None = None
    isa: str | None = None
    architecture: Architecture | None = None
    processors: int = 0
    cache_bytes: int = 0
    present: bool = True
    index: int | None = None
    memory: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.type) if self.index is None else torch.device(self.type, self.index)

    @property
    def spec(self) -> str:
        """The name by which `probe_device` makes this device, in every process that sees the same GPUs."""
        if self.index is not None:
            return f"{self.type}:{self.index}"
        return self.type if self.present or self.architecture is None else self.architecture.spec

    def describe(self) -> str:
        """Say what the device is called, and for one of several GPUs its number too."""
        return self.name if self.index is None else f"{self.name} ({self.spec})"

    def __hash__(self) -> int:
        return hash((self.type, self.name))  # kernels look tiles up by it at every launch

    def __str__(self) -> str:
        return self.name


def probe_device(device: str = "auto") -> Device:
    """Find the device that a name means on this machine.

    device: "auto" (the GPU that "cuda" means where torch can use it, else the CPU), "cpu", "cuda:1" for a GPU by its
    number, or "cuda": under torchrun the GPU of LOCAL_RANK, else the current one of the calling thread; or, for a plan,
    the name of an architecture such as "cuda:sm90" or "hip:gfx942", which means any GPU of it.
    Raises ConfigError "device" for a device that torch cannot use, or an unknown architecture; "rank-devices" where
    LOCAL_RANK has no GPU.
    """
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available() and not why_torch_cannot(torch.cuda.get_device_properties(own_gpu())):
            device = "cuda"
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{own_gpu()}"
    return _known_device(device)


@functools.cache
def _known_device(device: str) -> Device:
    """Find the device of a name that means the same for as long as the process runs."""
    kind, _, which = device.partition(":")
    index = named_gpu(device)
    if device in ("cpu", "cpu:0"):
        from pymllm.kernels.native.extension import native_available, probe

        info = probe()
        return Device("cpu", info.brand, isa=info.best_path if native_available() else None)
    if index is not None and index < count_gpus():
        properties = torch.cuda.get_device_properties(index)
        reason = why_torch_cannot(properties)
        if reason is not None:
            raise ConfigError(
                f"torch cannot compute on {device}, {properties.name}",
                code="device",
                expected="a GPU that torch was built for",
                found=reason,
                fix="Install a build of torch for this GPU (https://pytorch.org), or run on the CPU: --device cpu.",
            )
        architecture = _architecture_of(properties)
        return Device(
            "cuda",
            properties.name,
            capability=(properties.major, properties.minor),
            architecture=architecture,
            processors=properties.multi_processor_count,
            cache_bytes=_cache_bytes(properties, architecture),
            index=index,
            memory=properties.total_memory,
        )
    if kind in ("cuda", "hip") and which[:1].isalpha():
        return _named_device(device, which)
    raise ConfigError(
        f"torch cannot use the device {device!r} on this machine",
        code="device",
        expected="auto, cpu"
        + (", cuda or cuda:N with a GPU's number" if count_gpus() else " (torch sees no GPU)"),
        found=f"{device}; {describe_gpus()}" if count_gpus() else device,
        fix=_right_name(kind, which),
    )


def _right_name(kind: str, which: str) -> str:
    """Say what a device that is called by a wrong name is called here; "" where the name is right, but not there."""
    if kind in ("gpu", "hip", "rocm"):
        return "A GPU is called cuda here." if kind == "gpu" else "torch calls AMD's GPUs cuda, too."
    number = which.strip().lstrip("0") or which[-1:]
    if kind == "cuda" and number.isascii() and number.isdecimal():
        return f"Write the number as torch does: cuda:{number}." if number != which else ""
    return nearest(kind.lower(), ("auto", "cpu", "cuda"))


def _named_device(device: str, which: str) -> Device:
    architecture = ARCHITECTURES.get(which)
    if architecture is None or architecture.spec != device:
        gpus = [f"cuda:{index}" for index in range(count_gpus())]
        names = [*gpus, *(known.spec for known in ARCHITECTURES.values())]
        raise unknown_name("GPU or architecture", device, names, code="device")
    return Device(
        "cuda",
        f"a GPU of architecture {which}",
        capability=architecture.capability,
        architecture=architecture,
        processors=architecture.processors,
        cache_bytes=architecture.cache_bytes,
        present=False,
    )


def _cache_bytes(properties: object, architecture: Architecture | None) -> int:
    """Return the bytes of a GPU's last cache.  torch knows an NVIDIA GPU's; of an AMD it knows one die's L2."""
    if architecture is not None and not architecture.is_nvidia:
        return architecture.cache_bytes
    return getattr(properties, "L2_cache_size", 0) or (architecture.cache_bytes if architecture else 0)


def _architecture_of(properties: object) -> Architecture | None:
    """Find the architecture whose kernels a GPU runs.  None: the GPU is older than all of them."""
    gfx = getattr(properties, "gcnArchName", "").split(":")[0]
    if torch.version.hip is not None:
        return ARCHITECTURES.get(gfx)
    capability = (properties.major, properties.minor)  # type: ignore[attr-defined]
    nvidia = [a for a in ARCHITECTURES.values() if a.is_nvidia]
    usable = [a for a in nvidia if a.capability[0] == capability[0] and a.capability <= capability]
    return max(usable, key=lambda a: a.capability, default=None)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one of this thread for a `with` block; for a CPU, or "cuda" alone, do nothing.

    Streams, graphs and Triton's launches go to the current GPU, and every thread has its own, at first GPU 0.
    """
    return torch.cuda.device(device) if device.type == "cuda" and device.index is not None else nullcontext()


def on_own_device(method: Method) -> Method:
    """Have a method run with the GPU of its object's `device` as the current one."""

    @functools.wraps(method)
    def run(self: Any, *given: Any, **named: Any) -> Any:
        with current(self.device):
            return method(self, *given, **named)

    return run  # type: ignore[return-value]
