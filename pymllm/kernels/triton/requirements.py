"""Needs of GPU kernels that a device or its software may not meet: the reasons that several of them give."""

from __future__ import annotations

import functools
import importlib.util

import torch

from pymllm.errors import install_command
from pymllm.kernels.hardware import Device
from pymllm.kernels.linear import LinearProblem
from pymllm.kernels.triton.launch import interpreting

FLOATS = (torch.float16, torch.bfloat16)


def why_not_device(device: Device) -> str | None:
    """Return why Triton kernels do not run on `device`, or None.

    A device that is known by name alone is judged as if it were here, with Triton.
    """
    if device.type != "cuda":
        return "needs a GPU"
    if device.architecture is None:
        return f"is not built for {device.name}, compute capability {device.capability}"
    if device.present and not interpreting() and not triton_installed():
        return f"needs the package triton ({install_command('triton')})"
    return None


def why_not_float_activations(problem: LinearProblem, activations: str) -> str | None:
    """Return why a kernel that leaves activations in 16-bit floats does not fit the problem, or None."""
    if problem.dtype not in FLOATS:
        return f"multiplies float16 or bfloat16 activations, not {problem.dtype}"
    if problem.compute == "checkpoint" and activations != "float":
        return "leaves activations in floats, which compute=checkpoint forbids"
    return why_not_device(problem.device)


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
