"""What kernels for norms, gates and rotary positions are given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pymllm.kernels.hardware import Device


@dataclass(frozen=True)
class ElementwiseProblem:
    """Norms, gated activations and rotary positions, which one kernel set runs for a whole model."""

    dtype: torch.dtype
    device: Device
