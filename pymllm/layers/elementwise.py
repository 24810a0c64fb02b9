"""Which kernels run norms, gated activations and rotary positions: one choice for a whole model."""

from __future__ import annotations

from typing import Any

from pymllm.config import Execution, current_execution
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import ElementwiseProblem, Selection, select
from pymllm.kernels.torch_elementwise import TorchElementwise

ANY = TorchElementwise()


def select_elementwise(execution: Execution) -> Selection[Any]:
    """The kernels for a model that runs as `execution` says, with the refused ones and why."""
    problem = ElementwiseProblem(execution.dtype, probe_device(execution.device))
    return select("elementwise", problem, execution.forced_kernel("elementwise"))


def elementwise_kernel() -> Any:
    """The current execution's kernels; a layer made on its own takes tensors of any kind, so torch's."""
    execution = current_execution()
    return ANY if execution is None else select_elementwise(execution).kernel
