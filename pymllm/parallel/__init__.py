"""Which rank of how many this process is, the collectives between ranks, and processes that follow rank 0.

There are two ways to have several ranks. Under torchrun every rank runs the whole program, and the ranks share what
depends on time (`Parallel.broadcast`). Or rank 0 leads: it alone has the requests, and the others run the same forwards
as it does; `LLM(tensor_parallel_size=N)` and `pymllm serve --tensor-parallel-size N` start them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymllm.parallel.groups import Group, ThreadGroup
    from pymllm.parallel.leader import Leader
    from pymllm.parallel.place import Parallel, choose_parallel, current_parallel, simulate
    from pymllm.parallel.process_group import ProcessGroup, leave_process_group
    from pymllm.parallel.ranks import Ranks

# Loaded when they are asked for: what starts ranks must not wait for torch.
MODULES = {
    "groups": ("Group", "ThreadGroup"),
    "leader": ("Leader",),
    "place": ("Parallel", "choose_parallel", "current_parallel", "simulate"),
    "process_group": ("ProcessGroup", "leave_process_group"),
    "ranks": ("Ranks",),
}

__all__ = [
    "Group",
    "Leader",
    "Parallel",
    "ProcessGroup",
    "Ranks",
    "ThreadGroup",
    "choose_parallel",
    "current_parallel",
    "leave_process_group",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Load a name from the module that has it."""
    for module, names in MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
