"""The cause of a kernel's refusal: the device, something to install, a setting, or the layer itself.

The cause is found by asking again: a kernel that takes the same layer under another setting was refused for that
setting.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from pymllm.kernels.attention import KVType
from pymllm.kernels.canonical import DenseType
from pymllm.kernels.hardware import ARCHITECTURES, Device, probe_device
from pymllm.kernels.native.extension import native_missing_reason
from pymllm.kernels.registry import Operation, Refusal, Selection, kernels_for

Cause = Literal["device", "installation", "setting", "layer"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def explain(selection: Selection[Any]) -> list[dict[str, str]]:
    """Describe each kernel that was refused as {"kernel", "why", "cause", "fix"}.

    cause: see `Cause`.  fix: the settings under which the kernel would take the layer, as "dtype=bfloat16" or
    "compute=auto,dtype=bfloat16"; else "".
    """
    found = []
    for refusal in selection.refused:
        cause, fix = _cause(refusal, selection.operation, selection.problem)
        found.append({"kernel": refusal.kernel, "why": refusal.why, "cause": cause, "fix": fix})
    return found


@functools.cache
def _cause(refusal: Refusal, operation: Operation, problem: Any) -> tuple[Cause, str]:
    kernel = next(kernel for kernel in kernels_for(operation) if kernel.name == refusal.kernel)
    if getattr(kernel, "device_type", problem.device.type) != problem.device.type:
        return "device", ""
    if refusal.why == native_missing_reason() or any(word in refusal.why for word in ("pip install", "nvcc")):
        return "installation", ""
    for setting, changed in _other_settings(problem):
        if kernel.why_not(changed) is None:
            return "setting", setting
    if any(kernel.why_not(_with(problem, device=device)) is None for device in _other_gpus(problem.device)):
        return "device", ""
    return "layer", ""


def _other_settings(problem: Any) -> Iterator[tuple[str, Any]]:
    """Yield the other settings that a user may ask for, the fewest changes first, and the problem that each makes."""
    now = {"compute": getattr(problem, "compute", "auto"), "dtype": problem.dtype}
    asked = [{"compute": compute, "dtype": dtype} for compute in (now["compute"], "auto") for dtype in DTYPES]
    differing = [{key: value for key, value in settings.items() if value != now[key]} for settings in asked]
    for changes in sorted(filter(None, differing), key=len):
        named = ",".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in changes.items())
        if {**now, **changes} == {"compute": "auto", "dtype": torch.float32}:
            changes["compute"] = (
                "exact"  # to ask for float32 is to ask for its arithmetic too (`choose_execution`)
            )
        yield named, _with(problem, **changes)


def _other_gpus(device: Device) -> Iterator[Device]:
    if device.type == "cuda":
        yield from (probe_device(architecture.spec) for architecture in ARCHITECTURES.values())


def _with(problem: Any, **changes: Any) -> Any:
    """Return the problem under another setting.

    The products of its experts change with it, and so does all that is stored in the activations' dtype.
    """
    changed: dict[str, Any] = {}
    for field in fields(problem):
        value = getattr(problem, field.name)
        if field.name in changes:
            changed[field.name] = changes[field.name]
        elif field.name == "gate_up":
            changed[field.name] = tuple(_with(product, **changes) for product in value)
        elif field.name == "down":
            changed[field.name] = _with(value, **changes)
        elif "dtype" in changes and isinstance(value, (DenseType, KVType)) and value.dtype is problem.dtype:
            changed[field.name] = replace(value, dtype=changes["dtype"])
    return replace(problem, **changed)
