"""The stage `env`: what this machine has, whether torch multiplies on it, and the first kernel of ours."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .compiler import choose_compiler, python_header
from .driver import ROOT
from .notes import Notes, WrongResult

PACKAGES = (
    *(
        "torch",
        "triton",
        "numpy",
        "tokenizers",
        "tqdm",
        "safetensors",
        "transformers",
        "huggingface_hub",
        "jinja2",
    ),
    *("pytest", "xdist", "flashinfer", "gemlite", "matplotlib", "vllm"),
)
NEEDED = ("numpy", "tokenizers", "tqdm")  # what a model in a folder cannot be loaded without
TOOLS = (
    "gcc",
    "g++",
    "clang",
    "nvcc",
    "make",
    "cmake",
    "git",
    "nvidia-smi",
    "compute-sanitizer",
    "ncu",
    "nsys",
)
FIRST_TOLERANCE = 2e-2


def run(notes: Notes) -> None:
    rehearse, out = notes.task.rehearse, Path(notes.task.out)
    found: list[str] = []
    notes.run("packages and tools", lambda: look_around(found))
    notes.run("this clone is what is imported", which_clone)
    if not rehearse:
        notes.run("the C compiler", compiler)
        notes.run("the GPU", lambda: gpu(found))
        notes.run("torch multiplies", torch_multiplies)
    notes.run("the first kernel", lambda: first_kernel(rehearse))
    (out / "environment.txt").write_text("\n".join(found) + "\n", encoding="utf-8")


def look_around(found: list[str]) -> dict[str, Any]:
    """List versions and tools."""
    versions = {name: _version(name) for name in PACKAGES}
    found += [
        f"python {platform.python_version()} {sys.executable}",
        f"{platform.platform()}, {os.cpu_count()} CPUs",
    ]
    found += [f"{name} {version or 'is not installed'}" for name, version in versions.items()]
    found += [f"{tool}: {shutil.which(tool) or 'not here'}" for tool in TOOLS]
    missing = [name for name in NEEDED if versions[name] is None]
    short = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = ", ".join(name for name, version in versions.items() if version is None)
    say = [
        f"python {platform.python_version()}, {os.cpu_count()} CPUs, {short}",
        f"not installed: {absent or 'nothing'}",
    ]
    if missing:
        raise WrongResult(f"{', '.join(missing)} cannot be imported: no model can be loaded", {"say": say})
    return {"say": say}


def _version(name: str) -> str | None:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # an installed package may fail in any way, and that is what is to be told
        return (
            None
            if isinstance(error, ModuleNotFoundError)
            else f"FAILS ({type(error).__name__}: {str(error)[:80]})"
        )
    return str(getattr(module, "__version__", "without a version"))


def which_clone() -> dict[str, Any]:
    import pymllm

    where = Path(pymllm.__file__).resolve().parents[1]
    if where != ROOT:
        raise WrongResult(
            f"this Python imports the pymllm of {where}, not that of {ROOT}: uninstall it, or use another"
        )
    return {}


def compiler() -> dict[str, Any]:
    """Say what Triton builds its launcher with, once.  WrongResult where nothing can."""
    chosen, header = choose_compiler(), python_header()
    say = f"Triton's C compiler: {chosen.found}; Python.h: {header or 'missing'}"
    if chosen.missing:
        raise WrongResult(f"no C compiler: {chosen.found}; install gcc", {"say": say})
    if header is None:
        raise WrongResult(
            "Triton builds its launcher with Python.h, which is missing: install python3-dev", {"say": say}
        )
    return {"say": say}


def gpu(found: list[str]) -> dict[str, Any]:
    """Describe the GPU as torch and the driver do."""
    import torch

    from pymllm.kernels.hardware import probe_device

    device, properties = probe_device("cuda"), torch.cuda.get_device_properties()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    architecture = (
        device.architecture.name if device.architecture else "no architecture that kernels are built for"
    )
    say = [
        f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.multi_processor_count} processors, {architecture}, {runtime}"
    ]
    if shutil.which("nvidia-smi"):
        asked = "driver_version,memory.used,clocks.sm,clocks.max.sm,power.limit,mig.mode.current"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        say += [
            f"driver, memory in use, clock, top clock, power limit, MIG: {line}"
            for line in said.stdout.splitlines()
        ]
    found += [str(properties), *say]
    if device.architecture is None:
        raise WrongResult(f"GPU kernels are not built for {properties.name}", {"say": say})
    return {"say": say}


def torch_multiplies() -> dict[str, Any]:
    import torch

    x = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    error = float(((x @ x).double() - x.double() @ x.double()).norm() / (x.double() @ x.double()).norm())
    if not error < FIRST_TOLERANCE:
        raise WrongResult(f"torch's own product is off by {error:.4f}")
    return {"error": round(error, 5)}


def first_kernel(rehearse: bool) -> dict[str, Any]:
    """Run one norm: Triton's launcher is built, a kernel compiled and launched, and its answer looked at."""
    import torch

    from pymllm.kernels.aten.elementwise import TorchElementwise
    from pymllm.kernels.triton.elementwise import TritonElementwise

    where = "cpu" if rehearse else "cuda"
    x, weight = (torch.randn(*shape).to(where, torch.bfloat16) for shape in ((3, 256), (256,)))
    started = time.monotonic()
    found = TritonElementwise().rms_norm(x, weight, 1e-6)
    assert isinstance(found, torch.Tensor)
    error = float(
        (found.double() - TorchElementwise().rms_norm(x, weight, 1e-6).double()).norm()
        / found.double().norm()
    )
    seconds = time.monotonic() - started
    if not error < FIRST_TOLERANCE:
        raise WrongResult(f"its result is off by {error:.4f}")
    return {"error": round(error, 5), "say": f"the first kernel ran after {seconds:.1f} s"}
