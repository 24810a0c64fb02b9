"""Tensor parallelism as a value: this process's rank, the number of ranks, and the collectives between them.

    with Parallel.from_environment() as parallel:   # one process a rank, started by torchrun
        model = load_model(path)

A `Parallel` is current for a `with` block while a model is built; every layer keeps the one it was built under.
`Parallel(rank, size)` alone is enough to shard and load weights; running a sharded model needs a group, which
`Parallel.from_environment` (torch.distributed) or `simulate` (threads of one process, for tests) makes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm.errors import ConfigError, RankError, ShardingError

TIMEOUT = 600.0  # seconds that a rank waits for the others in a collective
FAREWELL_SECONDS = 5.0  # that a rank waits for the others before it leaves the group

R = TypeVar("R")


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

    def broadcast_object(self, rank: int, value: Any) -> Any:
        """Return rank 0's Python value, on every rank."""


class ProcessGroup:
    """torch.distributed's default group (Gloo on a CPU, NCCL on a GPU)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        with _together(rank, self.size):
            torch.distributed.all_gather(parts, value.contiguous())
        return parts

    def all_reduce(self, rank: int, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        with _together(rank, self.size):
            torch.distributed.all_reduce(total)
        return total

    def all_to_all(self, rank: int, value: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = value.new_empty((sum(receive), *value.shape[1:]))
        with _together(rank, self.size):
            torch.distributed.all_to_all_single(received, value.contiguous(), receive, send)
        return received

    def broadcast_object(self, rank: int, value: Any) -> Any:
        box = [value]
        with _together(rank, self.size):
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]


@contextlib.contextmanager
def _together(rank: int, size: int) -> Iterator[None]:
    """Run a collective; torch's errors over a rank that is gone, or does not come, become one RankError."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().splitlines()
        late = any("timed out" in line.lower() for line in said)
        raise RankError(
            f"rank {rank} of {size} {'waited in vain for' if late else 'has lost'} another rank",
            code="rank-timeout" if late else "rank-lost",
            expected="every rank in the same collective",
            found=said[-1] if said else type(error).__name__,
            fix="Read the output of the rank that ended first, then start all ranks again.",
        ) from None


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

    def broadcast_object(self, rank: int, value: Any) -> Any:
        return self._share(rank, value)[0]


@dataclass(frozen=True)
class Parallel:
    """The place of this process: `rank` of `size` tensor-parallel ranks, joined by `group`.

    group: None: weights can be sharded and loaded, but the model cannot run.
    expert_parallel: every rank holds some of a layer's experts whole, instead of a share of each.
    """

    rank: int = 0
    size: int = 1
    group: Group | None = field(default=None, compare=False)
    expert_parallel: bool = False

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
        cls, backend: str | None = None, *, expert_parallel: bool = False, timeout: float = TIMEOUT
    ) -> Parallel:
        """Take rank and size from torchrun's RANK and WORLD_SIZE and join the group; one rank without them.

        backend: torch.distributed's; None: nccl where torch sees a GPU, else gloo.
        timeout: seconds after which a rank that waits for another one gives up, with a RankError.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(expert_parallel=expert_parallel)
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend or ("nccl" if torch.cuda.is_available() else "gloo"),
                timeout=timedelta(seconds=timeout),
            )
            atexit.register(leave_process_group)  # a process that exits inside its group may abort
        return cls(torch.distributed.get_rank(), size, ProcessGroup(size), expert_parallel)

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

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value, on every rank."""
        return value if self.size == 1 else self._group().broadcast_object(self.rank, value)

    def __enter__(self) -> Parallel:
        _stack.set((*_stack.get(), self))
        return self

    def __exit__(self, *exception: object) -> None:
        _stack.set(_stack.get()[:-1])


def leave_process_group() -> None:
    """End torch.distributed's default group, together with the other ranks; without a group do nothing.

    A rank that closes its connections while another rank still uses them makes that rank fail; so all meet first.
    Ranks that failed do not come: nobody waits longer than FAREWELL_SECONDS for them.
    """
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "gloo":
        # Nothing is lost if the ranks do not meet: this one leaves either way.
        with contextlib.suppress(RuntimeError):
            torch.distributed.monitored_barrier(timeout=timedelta(seconds=FAREWELL_SECONDS))
    torch.distributed.destroy_process_group()


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


def choose_parallel(size: int, expert_parallel: bool = False) -> Parallel:
    """Choose the current `Parallel`, or the one that torchrun started.

    size: how many ranks were asked for; ConfigError if there are more or fewer.  1: as many as there are.
    expert_parallel: whether to divide experts whole; the current `Parallel` may also say so.
    """
    parallel = current_parallel()
    if parallel.size == 1:
        parallel = Parallel.from_environment()
    if size not in (1, parallel.size):
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this job has {parallel.size} process{'es' * (parallel.size > 1)}",
            code="tp-processes",
            expected=f"{size} processes",
            found=str(parallel.size),
            fix=f"Start with: torchrun --nproc-per-node {size} -m pymllm ... (or your script).",
        )
    return replace(parallel, expert_parallel=expert_parallel or parallel.expert_parallel)
