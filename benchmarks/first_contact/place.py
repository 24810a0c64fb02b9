"""Where the checks run, at which sizes, and when a result is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device, probe_device

from .notes import WrongResult

# A check's name, and what runs it and returns its figures.
Check = tuple[str, Callable[[], dict[str, Any]]]
# Checks over the same weights or heads: their place in the order of importance, their group, and what makes them.
Unit = tuple[float, str, Callable[[], Iterable[Check]]]

ROW_TOLERANCE = (
    1.2e-2  # of a row's norm: weights, the result, and what lies between are each rounded to bfloat16
)
ELEMENT_TOLERANCE = (
    8e-2  # of an element and the rows' usual size: five times what rounding makes of the worst of 2^23
)


@dataclass(frozen=True)
class Place:
    """The GPU, or in a rehearsal the CPU, where Triton's interpreter runs kernels as for an sm90."""

    rehearse: bool

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def device(self) -> Device:
        return probe_device("cuda:sm90" if self.rehearse else "cuda")

    def randn(self, *shape: int, seed: int, dtype: torch.dtype) -> Tensor:
        """The same numbers on every device."""
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return made.to(self.torch_device, dtype)

    def compare(self, found: Tensor, expected: Tensor, tolerance: float = ROW_TOLERANCE) -> dict[str, Any]:
        """Compare rows of results.  Returns the error of the worst row, of its norm.

        A row's norm counts as no less than a tenth of the usual one.
        Raises WrongResult for another shape, numbers that are not finite, and rows or elements that are too far off.
        """
        tolerance *= 2 if self.rehearse else 1  # the interpreter truncates to bfloat16
        if found.shape != expected.shape:
            raise WrongResult(f"shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        found, expected = (t.double().reshape(-1, t.shape[-1]) for t in (found, expected))
        if not bool(torch.isfinite(found).all()):
            bad = int((~torch.isfinite(found)).sum())
            raise WrongResult(f"{bad} of {found.numel()} numbers are not finite")
        usual = expected.square().mean().sqrt().clamp(min=1e-30)
        norms = expected.square().mean(-1).sqrt().clamp(min=0.1 * float(usual))
        rows = (found - expected).square().mean(-1).sqrt() / norms
        elements = (found - expected).abs() / (expected.abs() + usual)
        worst, where = float(rows.max()), int(rows.argmax())
        if worst > tolerance:
            many = int((rows > tolerance).sum())
            raise WrongResult(
                f"error {worst:.4f} above {tolerance} in row {where}; {many} of {len(rows)} rows so"
            )
        element, at = float(elements.max()), int(elements.argmax())
        bound = ELEMENT_TOLERANCE * tolerance / ROW_TOLERANCE
        if element > bound:
            row, column = divmod(at, elements.shape[1])
            raise WrongResult(f"error {element:.4f} above {bound:.3g} at row {row}, column {column}")
        return {"error": round(worst, 5)}
