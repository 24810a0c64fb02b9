"""`pymllm doctor`: show versions, what the CPU and GPUs can do, and the formats, kernels and extras that are there."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from pymllm.cli.options import add_common_options
from pymllm.cli.output import print_json
from pymllm.errors import install_command
from pymllm.gpus import why_torch_cannot

SCHEMA_VERSION = 1
CORE = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy")


@dataclass(frozen=True)
class Extra:
    """An extra of pyproject.toml.

    purpose: what the extra is for.  packages: of each package the name to import and the name that pip knows.
    """

    purpose: str
    packages: tuple[tuple[str, str], ...]


EXTRAS = {
    "triton": Extra("GPU kernels, and compiling them for other machines", (("triton", "triton"),)),
    "flashinfer": Extra("attention over prompts on NVIDIA GPUs", (("flashinfer", "flashinfer-python"),)),
    "server": Extra(
        "pymllm serve",
        (
            ("fastapi", "fastapi"),
            ("pydantic", "pydantic"),
            ("uvicorn", "uvicorn"),
            ("prometheus_client", "prometheus-client"),
            ("llguidance", "llguidance"),
        ),
    ),
    "plot": Extra("pymllm verify --compare --plot", (("matplotlib", "matplotlib"),)),
    "writers": Extra(
        "other programs' writers, to test against",
        (("compressed_tensors", "compressed-tensors"), ("gguf", "gguf"), ("peft", "peft")),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="also say whether pymllm can run on it: auto, cpu, cuda or, of several GPUs, cuda:1"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    add_common_options(parser)


def execute(args: argparse.Namespace) -> int:
    report = examine(args.device)
    if args.json:
        print_json(report)
    else:
        print("\n".join(_wrapped(line) for line in lines(report)))
    return 1 if report["problems"] else 0


def examine(device: str | None = None) -> dict[str, Any]:
    """Look at everything.  Returns JSON values; `problems` says what keeps pymllm from running here.

    device: on which it shall run; None: on any.
    """
    problems: list[str] = []
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": _versions(),
        "cpu": _examine_cpu(problems),
        "gpus": _examine_gpus(problems),
        "formats": _list_formats(problems),
        "kernels": _list_kernels(problems),
        "kernels_for_other_devices": _list_kernels(problems, elsewhere=True),
        "extras": _list_extras(),
        "device": _examine_device(device, problems),
        "problems": problems,
    }


def _versions() -> dict[str, str | None]:
    import pymllm

    names = dict.fromkeys([*CORE, *(pip for extra in EXTRAS.values() for _, pip in extra.packages)])
    return {
        "pymllm": pymllm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in names},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_cpu(problems: list[str]) -> dict[str, Any]:
    from pymllm.kernels.native.extension import native_available, native_missing_reason, probe

    forced = os.environ.get("PYMLLM_CPU_ISA") or None
    native = {"present": native_available(), "missing_reason": native_missing_reason()}
    try:
        info = asdict(probe())
    except ValueError as error:
        # PYMLLM_CPU_ISA names no path that this CPU can run.
        problems.append(str(error))
        return {"forced_path": forced, "native_kernels": native}
    return {
        **info,
        "features": sorted(info["features"]),
        "runnable_paths": list(info["runnable_paths"]),
        "forced_path": forced,
        "threads": _count_threads(),
        "native_kernels": native,
    }


def _count_threads() -> dict[str, Any] | None:
    try:
        from pymllm.kernels.native.thread_count import describe_threads
    except (ImportError, OSError):  # torch: _examine_gpus reports it
        return None
    return describe_threads()


def _examine_gpus(problems: list[str]) -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError) as error:
        # OSError: a shared library of torch does not load.
        problems.append(f"torch cannot be imported: {error}")
        return []
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = [properties.major, properties.minor]
        reason = why_torch_cannot(properties)
        if reason is not None:
            problems.append(f"cuda:{index} ({properties.name}) cannot be used: {reason}")
        gpus.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": capability,
                "memory_bytes": properties.total_memory,
                "free_bytes": _free_memory(index),
            }
        )
    return gpus


def _free_memory(index: int) -> int | None:
    """Return how many bytes of a GPU are free; None where it cannot even be asked, as it is full."""
    from pymllm.weights.memory import available_memory

    try:
        return available_memory(f"cuda:{index}")
    except RuntimeError:
        return None


def _examine_device(device: str | None, problems: list[str]) -> dict[str, Any] | None:
    """Find what the device's name means here: the one that was asked for, or else auto; None: there is none."""
    if problems:
        return None
    from pymllm.errors import PymllmError
    from pymllm.kernels.hardware import probe_device

    try:
        found = probe_device(device or "auto")
    except PymllmError as error:
        problems.append(str(error))
        return None
    if not found.present:
        problems.append(
            f"{found.spec} can be planned for, but not run on: it names no device of this machine"
        )
    return {"asked": device or "auto", "device": found.spec, "name": found.name}


def _list_formats(problems: list[str]) -> list[str]:
    if problems:
        return []
    from pymllm.quantization.base import list_quantization_methods

    return sorted(list_quantization_methods())


def _list_kernels(problems: list[str], *, elsewhere: bool = False) -> dict[str, list[str]]:
    """List kernels by operation, the preferred one first.

    elsewhere: only the kernels for a device that this machine lacks, and native ones where they are not built.
    """
    if problems:
        return {}
    import torch

    from pymllm.kernels.native.extension import native_available
    from pymllm.kernels.registry import KERNELS, kernels_for

    lacking = not native_available()
    here = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    return {
        operation: [
            kernel.name
            for kernel in kernels_for(operation)
            if not elsewhere
            or getattr(kernel, "device_type", "cpu") not in here
            or (lacking and kernel.name.startswith("native"))
        ]
        for operation in KERNELS
    }


def _list_extras() -> dict[str, dict[str, Any]]:
    found = {}
    for name, extra in EXTRAS.items():
        missing = [pip for module, pip in extra.packages if importlib.util.find_spec(module) is None]
        found[name] = {"purpose": extra.purpose, "present": not missing, "missing": missing}
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """Write the report for people, one entry a line."""
    versions, cpu = report["versions"], report["cpu"]
    installed = [f"{name} {version}" for name, version in versions.items() if version and name != "platform"]
    text = [f"versions   {', '.join(installed)}", f"platform   {versions['platform']}"]
    if "brand" in cpu:
        sizes = [f"{name.upper()} {_size(cpu[f'{name}_bytes'])}" for name in ("l1d", "l2", "l3")]
        text += [
            f"cpu        {cpu['brand']} ({cpu['arch']}), {cpu['physical_cores'] or '?'} cores, "
            f"{cpu['logical_cpus']} threads usable",
            f"caches     {', '.join(sizes)}; transparent huge pages: {cpu['transparent_huge_pages'] or 'unknown'}",
            f"cpu path   {cpu['best_path']}{' (forced by PYMLLM_CPU_ISA)' if cpu['forced_path'] else ''}, "
            f"of {', '.join(cpu['runnable_paths'])}",
            f"features   {' '.join(cpu['features']) or 'none that matter here'}",
        ]
        if threads := cpu["threads"]:
            quota = threads["cpu_quota"]
            limit = "no CPU quota" if quota is None else f"CPU quota of this container: {quota:.4g}"
            text.append(f"threads    {threads['count']} (chosen by {threads['chosen_by']}); {limit}")
    native = cpu["native_kernels"]
    text.append(
        f"native     {'CPU kernels are built and load' if native['present'] else native['missing_reason']}"
    )
    for gpu in report["gpus"]:
        major, minor = gpu["capability"]
        free = "none" if gpu["free_bytes"] is None else f"{gpu['free_bytes'] / 1e9:.1f}"
        text.append(
            f"gpu        {gpu['device']}: {gpu['name']}, capability {major}.{minor}, "
            f"{free} of {gpu['memory_bytes'] / 1e9:.1f} GB free"
        )
    if not report["gpus"]:
        text.append("gpu        none that torch can use")
    elif versions["triton"]:
        from pymllm.kernels.triton.bound import why_not_bound

        slower = why_not_bound(versions["triton"])
        text.append(f"launches   {slower or 'go straight to compiled kernels'}")
    if device := report["device"]:
        text.append(f"device     {device['asked']} is {device['device']}: {device['name']}")
    text.append(f"formats    {', '.join(report['formats'])}")
    for operation, names in report["kernels"].items():
        others = report["kernels_for_other_devices"][operation]
        usable = ", ".join(name for name in names if name not in others)
        lacking = f"; not on this machine: {', '.join(others)}" if others else ""
        text.append(f"kernels    {operation}: {usable}{lacking}")
    for extra, state in report["extras"].items():
        absent = f"no {', '.join(state['missing'])}: {install_command(extra)}"
        text.append(f"extra      {extra} ({state['purpose']}): {'present' if state['present'] else absent}")
    text += [f"PROBLEM    {problem}" for problem in report["problems"]]
    if not report["problems"] and not native["present"]:
        text.append(
            "SLOW       pymllm runs here, but quantised models run slowly on the CPU: see native above"
        )
    elif not report["problems"]:
        text.append("all well   pymllm runs here; to see it: pymllm run --demo")
    return text


def _wrapped(line: str) -> str:
    """Wrap a long line for a terminal, so that it goes on below its text."""
    if not sys.stdout.isatty():
        return line
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(
        line, columns, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
    )


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    return f"{nbytes // 1024} KiB" if nbytes < 1 << 20 else f"{nbytes / (1 << 20):.1f} MiB"
