"""Where the ranks of one model meet, and who starts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymllm.errors import ConfigError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ranks:
    """The way by which the ranks that follow rank 0 come to it.

    host: the address that rank 0 listens on, which the others reach it by.  port: 0: a free one.
    key: what a rank must know to be let in; None: rank 0 makes one for those that it starts itself.
    started: how many of the others rank 0 starts itself; None: all of them.
    begun: a `Leader` that has started them already.
    """

    host: str = LOOPBACK
    port: int = 0
    key: str | None = None
    started: int | None = None
    begun: Any = None


def ranks_of_node(size: int, nodes: int, node: int) -> range:
    """Return the ranks that a machine has.  ConfigError where the machines cannot have equally many.

    size: how many ranks there are.  nodes: how many machines.  node: which one.
    """
    if nodes < 1 or size % nodes or not 0 <= node < nodes:
        raise ConfigError(
            "the ranks cannot be shared evenly by the machines",
            code="nodes",
            expected=f"--nnodes that divides --tensor-parallel-size {size}, and 0 <= --node-rank < --nnodes",
            found=f"--nnodes {nodes} --node-rank {node}",
        )
    each = size // nodes
    return range(node * each, (node + 1) * each)
