"""The choice of kernels for norms, gated activations and rotary positions: one for a whole model."""

from __future__ import annotations

from typing import Any

from torch import nn

from pymllm.config import Execution, current_execution
from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.kernels.elementwise import ElementwiseProblem
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.kernels.registry import Selection, select

ANY = TorchElementwise()


def select_elementwise(execution: Execution) -> Selection[Any]:
    """Choose the kernels for a model that runs as `execution` says; the result also names the refused ones and why."""
    problem = ElementwiseProblem(execution.dtype, probe_device(execution.device))
    return select("elementwise", problem, execution.forced_kernel("elementwise"))


def elementwise_kernel() -> Any:
    """Return the kernels of the current execution; without one torch's, as a layer on its own may get any tensor."""
    execution = current_execution()
    return ANY if execution is None else select_elementwise(execution).kernel


def codes_between(giver: nn.Module, taker: Any, size: int) -> RowCodes | None:
    """Return the codes in which the kernel of `giver` gives its result, rows of `size`, to `taker`, its only reader.

    None: the result is floats, as `taker` wants them (it has no `input_codes`), the kernel makes no such codes, or a
    hook looks at the result.
    """
    why_not = getattr(giver.kernel, "why_not_codes", None)
    if why_not is None or taker is None or giver._forward_hooks:
        return None
    codes = getattr(taker, "input_codes", None)
    return codes if codes is not None and why_not(codes, size) is None else None
