"""What an object has whose model runs on ranks that follow this one: their health, their end, and calls of them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pymllm.errors import RankError
from pymllm.parallel.leader import FAREWELL, Leader
from pymllm.parallel.place import Parallel

C = TypeVar("C", bound=Callable[..., None])


def ends_ranks(constructor: C) -> C:
    """Have a constructor of something `Ranked` that fails end the ranks that it has started."""

    @functools.wraps(constructor)
    def construct(self: Ranked, *given: Any, **named: Any) -> None:
        try:
            constructor(self, *given, **named)
        except BaseException:
            parallel = getattr(self, "parallel", None)
            if parallel is not None and parallel.leader is not None:
                parallel.leader.close()
            raise

    return construct  # type: ignore[return-value]


def check_same_files(found: Sequence[str]) -> None:
    """Raise RankError where ranks have different files of an adapter.  found: what each has."""
    rank = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if rank is not None:
        raise RankError(
            f"the adapter differs: rank 0 has {found[0]}, and rank {rank} has {found[rank]}",
            code="ranks-disagree",
            fix="Copy the adapter to all machines.",
        )


class Ranked:
    """The base of what owns ranks.  parallel: this rank's place."""

    parallel: Parallel
    _lock: threading.RLock  # held while the model runs
    _leader: Leader | None = None

    def _own_ranks(self) -> None:
        """End the ranks that follow this one together with this object."""
        if self.parallel.leader is not None:
            weakref.finalize(self, self.parallel.leader.close)

    def _lead(self) -> None:
        """Wait until the ranks that follow this one have loaded, and tell them from now on what changes."""
        if self.parallel.leader is not None:
            self.parallel.leader.await_ready()
            self._leader = self.parallel.leader

    def _tell_ranks(self, how: str, *arguments: str, files: Callable[[], str] | None = None) -> None:
        """Have the ranks that follow this one do the same with an adapter.  RankError where they cannot.

        files: describes the adapter's files; every rank must have the same.
        """
        if self._leader is None:
            if files is not None and self.parallel.group is not None and not self.parallel.led:
                # Under torchrun every rank does this.
                check_same_files(self.parallel.exchange(files()))
            return
        found = None if files is None else files()
        errors = self._leader.ask({"do": "adapter", "how": how, "arguments": arguments, "files": found})
        for rank, error in enumerate(errors, 1):
            if error is not None:
                failed = RankError(f"rank {rank} could not change an adapter: {error}", code="rank-adapter")
                # Some have changed it, and some have not.
                self._leader.lose(failed)
                raise failed

    def why_not_healthy(self) -> str | None:
        """Return why the ranks of this model can answer no more, or None; one rank alone is always healthy."""
        return None if self.parallel.leader is None else self.parallel.leader.why_not_healthy()

    def ping(self) -> dict[int, float]:
        """Return how many seconds ago each rank that follows this one was last heard of.  RankError if one is lost."""
        return {} if self.parallel.leader is None else self.parallel.leader.ping()

    def close(self) -> None:
        """End the ranks that follow this one; the model cannot run any more then.  Without such ranks do nothing."""
        if self.parallel.leader is None:
            return
        # A step that runs is run to its end, if it has one.
        turn = self._lock.acquire(timeout=FAREWELL)
        try:
            self.parallel.leader.close()
        finally:
            if turn:
                self._lock.release()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
