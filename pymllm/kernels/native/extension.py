"""The CPU of this machine, and the binding of the native kernels in `pymllm._native`.

The extension is optional: without it the functions here answer from /proc and /sys, and `native_missing_reason()` says
what is lost and how to get it. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Kernel paths, best first, with the features that each needs. kernels/cpu_probe.cpp has the same table for C++.
_PATHS: Mapping[str, tuple[str, ...]] = {
    "avx512_vnni": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
    "avx2_vnni": ("avx2", "fma", "f16c", "avx_vnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon_dotprod": ("neon", "dotprod"),
    "portable": (),
}

# How pymllm is installed again; pip would take what it has built before, without kernels.
AGAIN = "in a clone: make native; else: pip install --force-reinstall --no-cache-dir --no-deps, with what you installed"

# The features that are looked for; on ARM, /proc/cpuinfo has names of its own for some.
_X86_FEATURES = frozenset(
    {"sse4_2", "avx2", "fma", "f16c", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"}
    | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
)
_ARM_FEATURES = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}

# The names that Python calls in the extension: one that lacks a part was built from older sources.
NATIVE_PARTS = (
    "Tape",
    "Watch",
    "attention",
    "causal_conv",
    "copy_rows",
    "float_linear",
    "gated_delta",
    "integer_experts",
    "integer_gather",
    "integer_linear",
    "integer_pack",
    "integer_unpack",
    "isa_code",
    "lane_sums",
    "log_probabilities",
    "mamba2_scan",
    "pointwise",
    "probe",
    "rms_norm",
    "roofline_f32",
    "roofline_int8",
    "roofline_pages",
    "roofline_read",
    "rotate",
    "sample_tokens",
    "silu_and_mul",
    "split_columns",
    "split_fields",
    "split_rows",
    "store_kv",
    "widen",
)


@dataclass(frozen=True, kw_only=True)
class CpuInfo:
    """The CPU, and the kernel path that is taken on it.  Sizes are in bytes; None means unknown."""

    native: bool  # True: the extension asked the CPU; False: read from the operating system, without native kernels
    arch: str  # "x86_64", "aarch64" or "other"
    vendor: str | None
    brand: str  # as the maker writes it, or the architecture where nothing names it
    features: frozenset[str]  # those that the CPU has and whose registers the system saves
    runnable_paths: tuple[str, ...]  # the kernel paths that this CPU can run, best first
    best_path: str  # the path to take: the first of them, or the one that PYMLLM_CPU_ISA names
    logical_cpus: int  # those that this process may run on
    physical_cores: int | None  # those that the logical CPUs sit on; a virtual machine may misreport them
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    transparent_huge_pages: str | None  # "always", "madvise" or "never"; Linux only


def native_available() -> bool:
    """Tell whether the native CPU kernels are built and load."""
    return _load_native()[0] is not None


def native_missing_reason() -> str | None:
    """Return why the native kernels do not load, what that costs and what to do; None: they load."""
    return _load_native()[1]


@functools.cache
def native() -> Any:
    """Return the extension, for kernels that are only chosen where it loads."""
    return importlib.import_module("pymllm._native")


@functools.cache
def isa_code(name: str | None) -> int:
    """Return the extension's number of a kernel path.  None: the path that the probe chose."""
    return native().isa_code(name or "")


def probe() -> CpuInfo:
    """Ask the CPU what it can run.  This takes a few file reads: ask once and keep the answer.

    The environment variable PYMLLM_CPU_ISA forces another kernel path.
    Raises ValueError if it names no path, or one that this CPU cannot run.
    """
    extension, _ = _load_native()
    if extension is None:
        return _probe_from_files()
    found = extension.probe()
    found["features"] = frozenset(name for name, present in found["features"].items() if present)
    found["runnable_paths"] = tuple(found["runnable_paths"])
    found["brand"] = found["brand"] or _unnamed(found["arch"])
    return CpuInfo(native=True, **found)


@functools.lru_cache(maxsize=1)
def _load_native() -> tuple[ModuleType | None, str | None]:
    try:
        extension = importlib.import_module("pymllm._native")
    except ModuleNotFoundError as error:
        if error.name != "pymllm._native":
            raise
        return None, (
            "the native CPU kernels are not built: quantised layers run on slower torch operations on the CPU. "
            f"Install a C++ compiler (gcc 10 or newer, clang, or MSVC), and install pymllm again ({AGAIN})"
        )
    except ImportError as error:
        return None, (
            f"the native CPU kernels are built but do not load ({error}): quantised layers run on slower torch "
            f"operations on the CPU. Install pymllm again with this Python ({AGAIN})"
        )
    missing = [part for part in NATIVE_PARTS if not hasattr(extension, part)]
    if missing:
        return None, (
            f"the native CPU kernels are older than the Python code: they lack {', '.join(missing)}. Quantised layers "
            f"run on slower torch operations on the CPU. Install pymllm again ({AGAIN})"
        )
    return extension, None


def _choose_path(features: frozenset[str], forced: str) -> str:
    """Choose the best path that `features` allow, or `forced` if it is not empty.

    Raises ValueError if `forced` is no path, or needs a feature that is missing.
    """
    runnable = _runnable_paths(features)
    if not forced:
        return runnable[0]
    if forced not in _PATHS:
        raise ValueError(f"PYMLLM_CPU_ISA={forced} is not a kernel path. Choose one of: {', '.join(_PATHS)}.")
    missing = [name for name in _PATHS[forced] if name not in features]
    if missing:
        raise ValueError(
            f"PYMLLM_CPU_ISA={forced}: this CPU lacks {', '.join(missing)}. It can run: {', '.join(runnable)}."
        )
    return forced


def _runnable_paths(features: frozenset[str]) -> tuple[str, ...]:
    return tuple(path for path, needs in _PATHS.items() if features.issuperset(needs))


def _probe_from_files() -> CpuInfo:
    """Answer as `probe` does, without the extension: in full on Linux, mostly None elsewhere."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cpuinfo = _read_cpuinfo()
    arch = {"amd64": "x86_64", "x86_64": "x86_64", "arm64": "aarch64", "aarch64": "aarch64"}.get(
        platform.machine().lower(), "other"
    )
    if arch == "x86_64":
        # Linux lists a feature only when it saves the registers too, so this is as strict as the native probe.
        features = _X86_FEATURES.intersection(cpuinfo.get("flags", "").split())
    elif arch == "aarch64":
        listed = cpuinfo.get("Features", "asimd").split()  # asimd is part of the architecture
        features = frozenset(ours for theirs, ours in _ARM_FEATURES.items() if theirs in listed)
    else:
        features = frozenset()
    caches = _read_caches(cpus[0] if cpus else 0)
    return CpuInfo(
        native=False,
        arch=arch,
        vendor=cpuinfo.get("vendor_id"),
        brand=cpuinfo.get("model name") or _unnamed(arch),
        features=features,
        runnable_paths=_runnable_paths(features),
        best_path=_choose_path(features, os.environ.get("PYMLLM_CPU_ISA", "")),
        logical_cpus=len(cpus) or os.cpu_count() or 1,
        physical_cores=_count_physical_cores(cpus),
        l1d_bytes=caches.get("1"),
        l2_bytes=caches.get("2"),
        l3_bytes=caches.get("3"),
        transparent_huge_pages=_read_huge_page_mode(),
    )


def _unnamed(arch: str) -> str:
    return platform.processor() or f"{arch} CPU"


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _read_cpuinfo() -> dict[str, str]:
    """Read the first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    entries = {}
    for line in (_read_text("/proc/cpuinfo") or "").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        entries[name.strip()] = value.strip()
    return entries


def _count_physical_cores(cpus: list[int]) -> int | None:
    siblings = {_read_text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    return len(siblings) if siblings and None not in siblings else None


def _read_caches(cpu: int) -> dict[str, int]:
    """Read the bytes of each cache level, of data and unified caches only."""
    caches = {}
    for index in range(16):
        folder = f"/sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        level, kind, size = (_read_text(f"{folder}/{name}") for name in ("level", "type", "size"))
        if level and size and kind in ("Data", "Unified"):
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
            caches[level] = int(size.rstrip("KM")) * unit
    return caches


def _read_huge_page_mode() -> str | None:
    modes = _read_text("/sys/kernel/mm/transparent_hugepage/enabled") or ""  # "always [madvise] never"
    return modes.partition("[")[2].partition("]")[0] or None
