"""Tensor parallelism as a value: this process's rank, the number of ranks, and the collectives between them.

    with Parallel.from_environment() as parallel:   # one process a rank, started by torchrun
        model = load_model(path)

A `Parallel` is current for a `with` block while a model is built; every layer keeps the one it was built under.
`Parallel(rank, size)` alone is enough to shard and load weights; running a sharded model needs a group, which
`Parallel.from_environment` (torch.distributed) or `simulate` (threads of one process, for tests) makes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pymllm.errors import ConfigError, ShardingError, counted
from pymllm.gpus import local_rank, local_ranks, named_gpu, refuse_one_gpu
from pymllm.parallel.groups import Group, ThreadGroup
from pymllm.parallel.heartbeat import Heartbeat
from pymllm.parallel.leader import Leader
from pymllm.parallel.process_group import TIMEOUT, ProcessGroup, choose_backend, choose_gpu, join_environment
from pymllm.parallel.ranks import Ranks

R = TypeVar("R")

# Of the group that this process has joined under torchrun.
_heartbeats: list[Heartbeat] = []


@dataclass(frozen=True)
class Parallel:
    """The place of this process: `rank` of `size` tensor-parallel ranks, joined by `group`.

    group: None: weights can be sharded and loaded, but the model cannot run.
    expert_parallel: every rank holds some of a layer's experts whole, instead of a share of each.
    led: rank 0 alone decides, and the others run what it says.  leader: rank 0's hold of the others, where it is led.
    gpu: the number of the GPU that this rank has; None: none of its own.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = field(default=None, compare=False)
    expert_parallel: bool = False
    led: bool = False
    leader: Leader | None = field(default=None, compare=False)
    gpu: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ShardingError(
                "a tensor-parallel rank must lie in 0..size-1",
                code="parallel-rank",
                expected=f"0 <= rank < {self.size}",
                found=f"rank {self.rank} of {self.size}",
            )

    @classmethod
    def from_environment(
        cls,
        backend: str | None = None,
        *,
        expert_parallel: bool = False,
        timeout: float = TIMEOUT,
        device: str = "auto",
    ) -> Parallel:
        """Take rank and size from torchrun's RANK and WORLD_SIZE and join the group; one rank without them.

        backend: torch.distributed's; None: nccl where torch sees a GPU, else gloo.
        timeout: seconds after which a rank that waits for another one gives up, with a RankError.
        device: that the model is loaded to. On GPUs the rank has that of LOCAL_RANK; ConfigError where there is none.
        """
        size = world_size()
        if size == 1:
            return cls(expert_parallel=expert_parallel)
        if named_gpu(device) != local_rank():
            refuse_one_gpu(device, local_ranks())
        if not torch.distributed.is_initialized():
            _heartbeats[:] = [join_environment(backend, timeout, device)]
        check, gpu = _heartbeats[0].check if _heartbeats else None, choose_gpu(device, local_rank())
        rank = torch.distributed.get_rank()
        return cls(rank, size, ProcessGroup(size, check), expert_parallel, gpu=gpu)

    def device_of(self, device: str) -> str:
        """Return the name of the device that a name means on this rank: "cuda" and "auto" are the GPU that it has.

        ConfigError for a GPU that another rank has.
        """
        named = named_gpu(device)
        if self.gpu is None or (named is None and device not in ("auto", "cuda")):
            return device
        if named not in (None, self.gpu):
            raise ConfigError(
                f"rank {self.rank} of {self.size} has cuda:{self.gpu}, and cannot load to {device}",
                code="rank-devices",
                expected=f"cuda, or cuda:{self.gpu} on this rank",
                found=device,
                fix="With --device cuda rank i of a machine runs on its GPU i, of those in CUDA_VISIBLE_DEVICES.",
            )
        return f"cuda:{self.gpu}"

    def _group(self) -> Group:
        if self.group is None:
            raise ConfigError(
                f"rank {self.rank} of {self.size} has no group that joins it to the other ranks",
                code="parallel-group",
                fix="Start one process for each rank with torchrun and use Parallel.from_environment, or use "
                "pymllm.parallel.simulate in a test.",
            )
        return self.group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks."""
        return x if self.size == 1 else self._group().all_reduce(self.rank, x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Concatenate the x of all ranks along `dim`, in rank order."""
        return x if self.size == 1 else torch.cat(self._group().exchange(self.rank, x), dim=dim)

    def all_to_all(
        self, x: Tensor, send: list[int], receive: list[int] | None = None
    ) -> tuple[Tensor, list[int]]:
        """Send `send[r]` rows of x, which lie in rank order, to each rank r.

        receive: how many rows each rank sends here; None: the ranks tell each other first.
        Returns the rows received, in rank order, and how many came from each rank.
        """
        if self.size == 1:
            return x, list(send)
        group = self._group()
        if receive is None:
            counts = torch.tensor(send, device=x.device)
            receive = group.all_to_all(self.rank, counts, [1] * self.size, [1] * self.size).tolist()
        return group.all_to_all(self.rank, x, send, receive), receive

    def gather(self, x: Tensor, dim: int = -1) -> Tensor | None:
        """Return what all_gather returns on rank 0, and None on every other rank."""
        gathered = self.all_gather(x, dim)
        return gathered if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, on every rank: what JSON has, in which tuples become lists.

        Where rank 0 leads, it alone asks, and has its own value.
        """
        if self.size == 1 or self.led:
            return value
        return self._group().broadcast_json(self.rank, value)

    def exchange(self, value: Any) -> list[Any]:
        """Collect the values of all ranks, in rank order: what JSON has."""
        return [value] if self.size == 1 else self._group().exchange_json(self.rank, value)

    def check(self) -> None:
        """Raise the RankError of a rank that is known to be lost, if rank 0 leads and this is it."""
        if self.leader is not None:
            self.leader.check()

    def __enter__(self) -> Parallel:
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _stack.set(_stack.get()[:-1])


_stack: ContextVar[tuple[Parallel, ...]] = ContextVar("parallel", default=())


def current_parallel() -> Parallel:
    """Return the innermost `with Parallel(...)`, or a single rank."""
    stack = _stack.get()
    return stack[-1] if stack else Parallel()


def simulate(size: int, work: Callable[[Parallel], R], *, expert_parallel: bool = False) -> list[R]:
    """Run `work` once for each rank, in `size` threads that are joined by a group.

    Returns the results in rank order.  An exception in one rank ends all of them and is raised here.
    """
    group = ThreadGroup(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with Parallel(rank, size, group, expert_parallel) as parallel:
                results[rank] = work(parallel)
        except threading.BrokenBarrierError:
            pass  # another rank failed; its exception is the one to report
        except BaseException as failure:
            failures.append(failure)
            group.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def world_size() -> int:
    """Return how many ranks torchrun has started; 1 without it.  ConfigError where WORLD_SIZE is no number of ranks."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ConfigError(
            "WORLD_SIZE does not say how many ranks there are",
            code="world-size",
            expected="an integer of at least 1, as torchrun sets it",
            found=repr(text),
        )
    return int(text)


def choose_parallel(
    size: int,
    expert_parallel: bool = False,
    ranks: Ranks | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> Parallel:
    """Choose the current `Parallel`, or the one that torchrun started, or else start the other ranks.

    size: how many ranks were asked for; ConfigError if there are more or fewer.  1: as many as there are.
    expert_parallel: whether to divide experts whole; the current `Parallel` may also say so.
    ranks: where the ranks meet that follow this one.  settings: what they load (`Leader.join`); None: nobody is.
    device: that the model is loaded to.
    """
    parallel = current_parallel()
    if parallel.size == 1:
        parallel = Parallel.from_environment(device=device)
    if parallel.size == 1 and size > 1 and settings is not None:
        ranks = ranks or Ranks()
        here = size if ranks.started is None else ranks.started + 1
        if ranks.begun is None:
            choose_backend(device, here)  # refuses what cannot be before processes are started
        leader = ranks.begun or Leader.start(size, ranks)
        # Of several ranks of a machine, rank 0 has GPU 0; alone it may have any.
        gpu = choose_gpu(device, 0 if here > 1 else local_rank())
        leader.join(settings, gpu)
        # Ranks that are lost are killed where this process has started them, and collectives end then.
        check = None if leader.started == size - 1 else leader.check
        return Parallel(0, size, ProcessGroup(size, check), expert_parallel, True, leader, gpu)
    if size not in (1, parallel.size):
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this job has {parallel.size} process{'es' * (parallel.size > 1)}",
            code="tp-processes",
            expected=f"{counted(size, 'process', 'processes')}",
            found=str(parallel.size),
            fix=f"Start with: torchrun --nproc-per-node {size} -m pymllm ... (or your script).",
        )
    return replace(parallel, expert_parallel=expert_parallel or parallel.expert_parallel)
