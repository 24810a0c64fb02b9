"""What a group of ranks can do together, and a group of threads of one process, which tests use."""

from __future__ import annotations

import json
import threading
from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """The collectives of a set of ranks.  Every rank must make every call, in the same order."""

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        """Collect the tensors of all ranks, which have one shape, in rank order."""

    def all_reduce(self, rank: int, value: Tensor) -> Tensor:
        """Sum the tensors of all ranks."""

    def all_to_all(self, rank: int, value: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send `send[r]` rows of `value`, which lie in rank order, to each rank r.

        receive: how many rows each rank sends here.  Returns the rows of all ranks, in rank order.
        """

    def exchange_json(self, rank: int, value: Any) -> list[Any]:
        """Collect the values of all ranks, which JSON must have, in rank order."""

    def broadcast_json(self, rank: int, value: Any) -> Any:
        """Return rank 0's value, which JSON must have, on every rank."""


class ThreadGroup:
    """A group of ranks that are threads of one process: each posts its value, all wait, all read."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.posted: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def _share(self, rank: int, value: Any) -> list[Any]:
        self.posted[rank] = value
        self.barrier.wait()
        everyone = list(self.posted)
        self.barrier.wait()
        return everyone

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        return self._share(rank, value)

    def all_reduce(self, rank: int, value: Tensor) -> Tensor:
        return torch.stack(self._share(rank, value)).sum(0)

    def all_to_all(self, rank: int, value: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return torch.cat([rows[rank] for rows in self._share(rank, value.split(send))])

    def exchange_json(self, rank: int, value: Any) -> list[Any]:
        # Written and read as between processes.
        return [json.loads(text) for text in self._share(rank, json.dumps(value))]

    def broadcast_json(self, rank: int, value: Any) -> Any:
        return json.loads(self._share(rank, json.dumps(value) if rank == 0 else None)[0])
