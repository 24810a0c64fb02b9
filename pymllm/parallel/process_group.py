"""torch.distributed's default group: joining it, its collectives, and leaving it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError, RankError, counted
from pymllm.gpus import (
    check_local_rank,
    count_gpus,
    describe_gpus,
    local_rank,
    named_gpu,
    own_gpu,
    refuse_one_gpu,
)
from pymllm.parallel.heartbeat import Heartbeat
from pymllm.parallel.ranks import LOOPBACK

TIMEOUT = 600.0  # seconds that a rank waits for the others in a collective
PATIENCE = 1.0  # seconds between two looks at the other ranks while a collective waits
FAREWELL_SECONDS = 60.0  # that a rank waits for the others before it leaves the group

# Whether the group has a collective that never ends: it cannot be left then.
_abandoned: list[bool] = []

# The loopback interface, by the names that Gloo is told.
INTERFACES = {"linux": "lo", "darwin": "lo0"}


class ProcessGroup:
    """torch.distributed's default group (Gloo on a CPU, NCCL on a GPU).

    check: raises the RankError of a rank that is known to be lost; it is called while a collective of Gloo's waits.
    """

    def __init__(self, size: int, check: Callable[[], None] | None = None) -> None:
        self.size = size
        self.check = check
        self.device = _device_of_group()
        self._waits = check is not None and torch.distributed.get_backend() == "gloo"

    def _finish(self, work: torch.distributed.Work | None) -> None:
        """Wait until a collective is done, or cannot be any more.  work: None: it is done."""
        while work is not None and self.check is not None:
            try:
                work.wait(timedelta(seconds=PATIENCE))
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # which raises the collective's own error, if it has one
                    return
            try:
                self.check()
            except RankError:
                _abandon(work)
                raise

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(value) for _ in range(self.size)]
        with _together(rank, self.size):
            self._finish(torch.distributed.all_gather(parts, value.contiguous(), async_op=self._waits))
        return parts

    def all_reduce(self, rank: int, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        with _together(rank, self.size):
            self._finish(torch.distributed.all_reduce(total, async_op=self._waits))
        return total

    def all_to_all(self, rank: int, value: Tensor, send: list[int], receive: list[int]) -> Tensor:
        received = value.new_empty((sum(receive), *value.shape[1:]))
        with _together(rank, self.size):
            sent = value.contiguous()
            self._finish(
                torch.distributed.all_to_all_single(received, sent, receive, send, async_op=self._waits)
            )
        return received

    def exchange_json(self, rank: int, value: Any) -> list[Any]:
        text = _bytes_of(value).to(self.device)
        sizes = [int(size) for size in self.exchange(rank, torch.tensor([len(text)], device=self.device))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(text)] = text
        texts = self.exchange(rank, padded)
        return [_value_of(each[:size]) for each, size in zip(texts, sizes, strict=True)]

    def broadcast_json(self, rank: int, value: Any) -> Any:
        text = _bytes_of(value).to(self.device) if rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(text)], device=self.device)
        with _together(rank, self.size):
            self._finish(torch.distributed.broadcast(size, 0, async_op=self._waits))
            if rank:
                text = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            self._finish(torch.distributed.broadcast(text, 0, async_op=self._waits))
        return value if rank == 0 else _value_of(text)


def _abandon(work: torch.distributed.Work) -> None:
    """Leave a collective that waits for a silent rank.

    Gloo's threads hang in it. Where the last reference to the group goes, at the exit of the process, torch waits for
    them; so that one is kept for ever.
    """
    _abandoned.append(True)
    for kept in (work, torch.distributed.group.WORLD):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _bytes_of(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value_of(text: Tensor) -> Any:
    return json.loads(text.cpu().numpy().tobytes())


def _device_of_group() -> torch.device:
    """Return where the tensors of the default group have to be: on the GPU that it was joined with, for NCCL."""
    if torch.distributed.get_backend() != "nccl":
        return torch.device("cpu")
    world = torch.distributed.group.WORLD
    bound: torch.device | None = None if world is None else world.bound_device_id
    return bound or torch.device("cuda", own_gpu())


@contextlib.contextmanager
def _together(rank: int, size: int) -> Iterator[None]:
    """Run a collective; torch's errors over a rank that is gone, or does not come, become one RankError."""
    try:
        yield
    except RankError:
        raise
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


def choose_backend(device: str = "auto", here: int = 1) -> str:
    """Return nccl where torch sees a GPU, else gloo, as a model on the CPU needs it.

    device: that the model is loaded to.  here: how many ranks this machine has; ConfigError for fewer GPUs, or where
    the device is one of them.
    """
    refuse_one_gpu(device, here)
    if device.partition(":")[0] == "cpu" or not count_gpus():
        return "gloo"
    if count_gpus() < here:
        raise ConfigError(
            "there are fewer GPUs than ranks",
            code="rank-devices",
            expected=f"a GPU for each of the {counted(here, 'rank')} of this machine",
            found=describe_gpus(),
            fix="Lower --tensor-parallel-size, or run on the CPU with --device cpu.",
        )
    return "nccl"


def choose_gpu(device: str, place: int | None) -> int | None:
    """Choose the GPU of a rank; None: it has none, or, without a place, whichever is current.

    device: that the model is loaded to; a GPU that it names by its number is taken.  place: which of its machine's
    ranks this one is.  ConfigError where the machine has no GPU for it.
    """
    if device.partition(":")[0] == "cpu" or not count_gpus():
        return None
    named = named_gpu(device)
    if named is not None and named < count_gpus():
        return named
    if place is not None:
        check_local_rank(place)
    return place


def open_store(host: str) -> tuple[torch.distributed.Store, int]:
    """Open the store through which ranks find one another, on this address alone.  Returns it and its port."""
    with socket.create_server(
        (host, 0), family=socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    ) as listener:
        port = int(listener.getsockname()[1])
        store = torch.distributed.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=TIMEOUT),
            master_listen_fd=os.dup(listener.fileno()),
        )
    return store, port


def join(
    rank: int,
    size: int,
    host: str,
    store: torch.distributed.Store | int,
    backend: str,
    gpu: int | None = None,
) -> ProcessGroup:
    """Join the default group through a store, or the one behind a port of `host`.

    gpu: the number of the GPU that the rank has, for NCCL; None: the current one.
    """
    device = _take_gpu(backend, gpu)
    if isinstance(store, int):
        store = torch.distributed.TCPStore(
            host, store, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT)
        )
    with _on_interface(INTERFACES.get(sys.platform) if host == LOOPBACK else None):
        torch.distributed.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
            device_id=device,
        )
    return ProcessGroup(size)


def join_environment(backend: str | None, timeout: float, device: str = "auto") -> Heartbeat:
    """Join the default group that torchrun's variables describe, and leave it when the process exits.

    device: that the model is loaded to.
    """
    gpu = choose_gpu(device, local_rank())
    backend = backend or choose_backend(device)
    torch.distributed.init_process_group(
        backend, timeout=timedelta(seconds=timeout), device_id=_take_gpu(backend, gpu)
    )
    atexit.register(leave_process_group)  # a process that exits inside its group may abort
    heartbeat = Heartbeat(torch.distributed.get_rank(), torch.distributed.get_world_size())
    atexit.register(heartbeat.stop)
    return heartbeat


def _take_gpu(backend: str, gpu: int | None) -> torch.device | None:
    """Make a rank's GPU the current one of this thread, for NCCL.  Returns it; None for another backend."""
    if backend != "nccl":
        return None
    taken = torch.device("cuda", own_gpu() if gpu is None else gpu)
    torch.cuda.set_device(taken)
    return taken


@contextlib.contextmanager
def _on_interface(name: str | None) -> Iterator[None]:
    """Have Gloo listen on one interface alone, unless the user has said on which."""
    if name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def leave_process_group(alone: bool = False) -> None:
    """End torch.distributed's default group, together with the other ranks; without a group do nothing.

    alone: whether the others are known to be done with it, so that nobody has to be waited for.
    A rank that closes its connections while another rank still uses them makes that rank fail; so all meet first.
    Ranks that failed do not come: nobody waits longer than FAREWELL_SECONDS for them.
    """
    if not torch.distributed.is_initialized() or _abandoned:
        return
    if not alone and torch.distributed.get_backend() == "gloo":
        # Nothing is lost if the ranks do not meet: this one leaves either way.
        with contextlib.suppress(RuntimeError):
            torch.distributed.monitored_barrier(timeout=timedelta(seconds=FAREWELL_SECONDS))
    torch.distributed.destroy_process_group()
