"""Which rank of how many this process is, the collectives between ranks, and processes that follow rank 0.

There are two ways to have several ranks. Under torchrun every rank runs the whole program, and the ranks share what
depends on time (`Parallel.broadcast`). Or rank 0 leads: it alone has the requests, and the others run the same forwards
as it does; `LLM(tensor_parallel_size=N)` and `pymllm serve --tensor-parallel-size N` start them.
"""

from pymllm.parallel.groups import Group, ThreadGroup
from pymllm.parallel.leader import Leader
from pymllm.parallel.place import Parallel, choose_parallel, current_parallel, simulate
from pymllm.parallel.process_group import ProcessGroup, leave_process_group
from pymllm.parallel.ranks import Ranks

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
