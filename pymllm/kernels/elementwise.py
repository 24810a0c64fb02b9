"""The contract of kernels for norms, gates and rotary positions: their problem.

`aten/elementwise.py` says what each of their methods computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pymllm.kernels.hardware import Device


@dataclass(frozen=True)
class ElementwiseProblem:
    """Norms, gated activations and rotary positions, which one kernel set runs for a whole model."""

    dtype: torch.dtype
    device: Device
