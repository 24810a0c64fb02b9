"""Rank 0's hold of the ranks that follow it: it starts them, tells them what to run, and knows when one is lost."""

from __future__ import annotations

import atexit
import contextlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pymllm.errors import ConfigError, RankError
from pymllm.parallel.away import Looks
from pymllm.parallel.children import Child, is_stopped
from pymllm.parallel.link import Link, encode
from pymllm.parallel.ranks import Ranks

logger = logging.getLogger("pymllm")

JOIN_SECONDS = 600.0  # that rank 0 waits for the others to come, and they for it
HELLO_SECONDS = 10.0  # that whoever connects has to say who it is
MAX_HELLO_BYTES = 4096
MOST_STRANGERS = 64  # that may be connected before they have said who they are; of more, the first is let go
PING_SECONDS = 1.0
SILENCE = 8.0  # seconds without a word after which a rank counts as lost
TICK = 0.25  # seconds between two looks at the ranks
FAREWELL = 10.0  # seconds that a rank has to end by itself

# What a rank says that has failed because another one has: the other one is to blame.
CONSEQUENCES = ("rank-lost", "rank-timeout")

FOLLOWER = ("-m", "pymllm.follower")


class Leader:
    """The followers of one rank 0.

    size: how many ranks there are.
    address: where it listens, (host, port).  failure: why the ranks can do no more; None: they can.
    on_lost: what is called once, in a thread of its own, when a rank is lost.
    """

    def __init__(self, size: int, ranks: Ranks) -> None:
        self.size = size
        self.key = secrets.token_hex(16) if ranks.key is None else ranks.key
        self.host, self.started = ranks.host, size - 1 if ranks.started is None else ranks.started
        self.failure: RankError | None = None
        self.on_lost: Callable[[RankError], None] | None = None
        self.links: dict[int, Link] = {}
        self.children: dict[int, Child] = {}
        self._strangers: dict[Link, float] = {}
        self._moved: dict[int, float] = {}  # when a rank that has not come yet was not stopped
        self._said: dict[int, RankError] = {}  # why a rank has failed, by its own words
        self._answers: dict[int, list[dict[str, Any]]] = {}
        self._later: tuple[float, RankError] | None = None
        self._ended = self._joined = False
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._listener = _open_listener(ranks.host, ranks.port)
        self.address = (ranks.host, int(self._listener.getsockname()[1]))
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pinged, self._seen = 0.0, Looks()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    @classmethod
    def start(cls, size: int, ranks: Ranks) -> Leader:
        """Start the other ranks, which then load what they need, as this process does; `join` waits for them."""
        leader = cls(size, ranks)
        atexit.register(leader.close)
        leader._watcher.start()
        return leader

    def join(self, settings: Mapping[str, Any], gpu: int | None = None) -> None:
        """Wait until all ranks have come, and join torch.distributed's group with them.

        settings: {"model": ..., "options": {...}}, which the ranks load that were started here.
        gpu: the number of this rank's GPU; None: it has none, or the current one.
        Raises RankError for a rank that does not come, or ends; ConfigError where this process has a group already.
        """
        import torch

        try:
            if torch.distributed.is_initialized():
                raise ConfigError(
                    "this process has ranks already",
                    code="parallel-group",
                    expected="one model on several ranks in a process",
                    fix="Close the other model first (llm.close()).",
                )
            self._wait(lambda: len(self.links) == self.size - 1, JOIN_SECONDS, "come")
            self._join(settings, gpu)
        except BaseException:
            self.close()
            raise

    def _join(self, settings: Mapping[str, Any], gpu: int | None) -> None:
        from pymllm.parallel.process_group import choose_backend, join, open_store

        backend = choose_backend(str(settings["options"].get("device", "auto")), self.started + 1)
        store, port = open_store(self.host)
        self.send({"is": "welcome", "store": port, "backend": backend, "settings": settings})
        done: list[BaseException | None] = []

        def work() -> None:
            try:
                join(0, self.size, self.host, store, backend, gpu)
                self._joined = True
                done.append(None)
            except Exception as error:
                done.append(error)
            with self._changed:
                self._changed.notify_all()

        # In a thread of its own: torch does not notice a rank that dies meanwhile.
        threading.Thread(target=work, name="join", daemon=True).start()
        self._wait(lambda: bool(done), JOIN_SECONDS, "join the group")
        if done[0] is not None:
            raise self.explain(RankError(f"the ranks could not join: {done[0]}", code="rank-join"))

    def check(self) -> None:
        """Raise the error of a lost rank, if one is."""
        if self.failure is not None:
            raise self.failure

    def why_not_healthy(self) -> str | None:
        """Return why the ranks can answer no more, or None."""
        return None if self.failure is None else str(self.failure)

    def ping(self) -> dict[int, float]:
        """Return how many seconds ago each of the other ranks was last heard of; they say a word every second.

        RankError where one is lost.
        """
        self.check()
        now = time.monotonic()
        return {rank: now - link.heard for rank, link in sorted(self.links.items())}

    def send(self, message: Mapping[str, Any], integers: Sequence[int] | np.ndarray[Any, Any] = ()) -> None:
        """Tell all ranks something.  RankError where one is lost."""
        self.check()
        if self._ended:
            raise RankError(
                "the other ranks have been ended",
                code="ranks-ended",
                fix="Load the model again after close().",
            )
        data = encode(message, integers)
        for rank, link in list(self.links.items()):
            try:
                link.send_bytes(data)
            except OSError as error:
                raise self.explain(_lost(rank, self.size, f"nothing can be sent to it: {error}")) from None

    def ask(self, message: Mapping[str, Any]) -> list[str | None]:
        """Tell all ranks something, and wait until all have done it.  Returns the error of each, or None."""
        with self._asking:
            self.send(message)
            self._wait(lambda: all(self._answers.get(rank) for rank in self.links), None, "answer")
            return [self._answers[rank].pop(0).get("error") for rank in sorted(self.links)]

    def await_ready(self) -> None:
        """Wait until all other ranks have loaded.  RankError where one is lost."""
        self._wait(lambda: all(self._answers.get(rank) for rank in self.links), None, "load")
        for answers in self._answers.values():
            answers.pop(0)

    def explain(self, error: RankError) -> RankError:
        """Return why the ranks can do no more, of which `error` is a consequence, or else itself the reason."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self._ended, 3.0)
        self.lose(error)
        return self.failure or error

    def lose(self, error: RankError) -> None:
        """Note that the ranks can do no more, and why, and end those that this process has started."""
        with self._changed:
            if self.failure is not None or self._ended:
                return
            self.failure = error
            self._changed.notify_all()
        logger.error("%s", error)
        self._drop()
        if self.on_lost is not None:
            threading.Thread(target=self.on_lost, args=(error,), name="lost", daemon=True).start()

    def close(self) -> None:
        """End the other ranks.  Whoever calls must not run anything on them meanwhile."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        healthy = self.failure is None
        if healthy:
            data = encode({"do": "end"})
            for link in self.links.values():
                with contextlib.suppress(OSError):
                    link.send_bytes(data)
            deadline = time.monotonic() + FAREWELL
            for child in self.children.values():
                child.wait(max(deadline - time.monotonic(), 0.0))
        self._drop()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(FAREWELL)
        if self._joined:
            from pymllm.parallel.process_group import leave_process_group

            # Where a rank was lost, torch may wait for it.
            leaving = threading.Thread(target=leave_process_group, args=(True,), name="leave", daemon=True)
            leaving.start()
            leaving.join(None if healthy else FAREWELL)

    def _drop(self) -> None:
        for child in list(self.children.values()):
            child.kill()
        for link in list(self.links.values()):
            link.close()

    def _wait(self, done: Callable[[], bool], seconds: float | None, what: str) -> None:
        with self._changed:
            came = self._changed.wait_for(
                lambda: done() or self.failure is not None or self._ended, timeout=seconds
            )
        self.check()
        if not came or not done():
            missing = sorted(set(range(1, self.size)) - self.links.keys())
            raise RankError(
                f"not all ranks {what}",
                code="rank-timeout",
                expected=f"{self.size - 1} other ranks within {seconds} seconds",
                found=f"nothing of {', '.join(map(str, missing)) or 'some'}",
                fix="Start the others with the same --tensor-parallel-size, --nnodes, --master-addr and --master-port.",
            )

    # What the watching thread does.

    def _watch(self) -> None:
        try:
            for rank in range(1, self.started + 1):
                self.children[rank] = self._start_child(rank)
            while not self._ended and self.failure is None:
                self._look()
        except Exception as error:
            logger.exception("the ranks cannot be watched")
            self.lose(RankError(f"the ranks cannot be watched: {error}", code="rank-lost"))
        finally:
            self._selector.close()
            self._listener.close()
            for stranger in self._strangers:
                stranger.close()
            # With this thread, which has started them, the system ends them.
            for child in self.children.values():
                child.wait(2 * FAREWELL)

    def _start_child(self, rank: int) -> Child:
        told = {"PYMLLM_RANK_KEY": self.key, "PYMLLM_RANK_PARENT": str(os.getpid())}
        place = ["--rank", str(rank), "--size", str(self.size), "--local-rank", str(rank)]
        host, port = self.address
        return Child([*FOLLOWER, *place, "--host", host, "--port", str(port)], told)

    def _look(self) -> None:
        """Take in what has come, and see who is silent or has ended."""
        for key, _ in self._selector.select(TICK):
            if key.fileobj is self._listener:
                with contextlib.suppress(OSError):
                    self._admit(self._listener.accept()[0])
            else:
                self._hear(key.data)
        now = time.monotonic()
        missed = self._seen.missed()
        if missed:
            self._wait_anew(now, missed)
        for link, since in list(self._strangers.items()):
            if now - since > HELLO_SECONDS:
                self._forget(link)
        for rank, child in self.children.items():
            if rank in self.links:
                continue
            if child.ended:
                self.lose(_lost(rank, self.size, child.describe_end()))
                return
            if not is_stopped(child.process):
                self._moved[rank] = now
            elif now - self._moved.setdefault(rank, now) > SILENCE:
                self.lose(_lost(rank, self.size, "it is stopped, and has not come yet", code="rank-silent"))
                return
        for rank, link in self.links.items():
            if now - link.heard > SILENCE:
                found = (
                    f"no word of it for {now - link.heard:.0f} seconds: it is stopped, or its machine is gone"
                )
                self.lose(_lost(rank, self.size, found, code="rank-silent"))
                return
        if now - self._pinged > PING_SECONDS:
            self._pinged = now
            for link in self.links.values():
                with contextlib.suppress(OSError):
                    link.ping()
        if self._later is not None and now > self._later[0]:
            self.lose(self._later[1])

    def _wait_anew(self, now: float, missed: float) -> None:
        """Give everybody their time once more, after this process has been away."""
        for link in list(self.links.values()):
            link.heard = max(link.heard, now)
        self._moved = dict.fromkeys(self._moved, now)
        self._strangers = dict.fromkeys(self._strangers, now)
        if self._later is not None:
            self._later = (self._later[0] + missed, self._later[1])

    def _admit(self, connection: socket.socket) -> None:
        while len(self._strangers) >= MOST_STRANGERS:
            self._forget(next(iter(self._strangers)))
        link = Link(connection)
        self._strangers[link] = time.monotonic()
        self._selector.register(connection, selectors.EVENT_READ, link)

    def _forget(self, link: Link) -> None:
        self._strangers.pop(link, None)
        self._selector.unregister(link.connection)
        link.close()

    def _hear(self, link: Link) -> None:
        rank = next((rank for rank, one in self.links.items() if one is link), None)
        try:
            for message, _ in link.receive(*(() if rank is not None else (MAX_HELLO_BYTES, 0))):
                if rank is None:
                    rank = self._greet(link, message)
                    if rank is None:
                        return
                else:
                    self._take(rank, message)
        except (EOFError, OSError):
            if rank is None:
                self._forget(link)
            else:
                self._selector.unregister(link.connection)
                self._miss(rank)
        except RankError as error:
            if rank is None:
                self._forget(link)
            else:
                self.lose(error)

    def _greet(self, link: Link, message: dict[str, Any]) -> int | None:
        """Let a rank in that says who it is.  Returns its rank; None: it is not let in."""
        rank, size, key = message.get("rank"), message.get("size"), message.get("key")
        if not isinstance(key, str) or not hmac.compare_digest(*map(_bytes_of, (key, self.key))):
            refused = "the key is not rank 0's (PYMLLM_RANK_KEY)"
        elif size != self.size:
            refused = (
                f"rank 0 has {self.size} ranks, and rank {rank} has {size}: --tensor-parallel-size differs"
            )
        elif not isinstance(rank, int) or not 0 < rank < self.size or rank in self.links:
            refused = f"there is a rank {rank} already, or none can be"
        else:
            del self._strangers[link]
            with self._changed:
                self.links[rank] = link
                self._answers[rank] = []
                self._changed.notify_all()
            return rank
        logger.warning("a rank was refused: %s", refused)
        with contextlib.suppress(OSError):
            link.send({"is": "refused", "reason": refused})
        self._forget(link)
        if size != self.size and refused.startswith("rank 0"):
            self.lose(RankError(refused, code="ranks-disagree", fix="Start all ranks with the same options."))
        return None

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        if message.get("is") == "failed":
            self._said[rank] = RankError(
                f"rank {rank} of {self.size} has failed: {message.get('reason')}",
                code=str(message.get("code")),
                fix="Start all ranks again." if message.get("code") in CONSEQUENCES else None,
            )
            return
        with self._changed:
            self._answers[rank].append(message)
            self._changed.notify_all()

    def _miss(self, rank: int) -> None:
        """Note that a rank's connection has ended."""
        child = self.children.get(rank)
        found = "its connection has ended" if child is None else child.describe_end()
        error = self._said.get(rank) or _lost(rank, self.size, found)
        if rank in self._said and error.code in CONSEQUENCES:
            self._later = self._later or (time.monotonic() + 1.0, error)
            self.links[rank].heard = time.monotonic() + 3600
        else:
            self.lose(error)


def _bytes_of(key: str) -> bytes:
    # JSON can have what UTF-8 cannot.
    return key.encode(errors="surrogatepass")


def _lost(rank: int, size: int, found: str, code: str = "rank-lost") -> RankError:
    return RankError(
        f"rank {rank} of {size} is lost",
        code=code,
        found=found,
        fix="Start all ranks again; `pymllm serve` does so by itself.",
    )


def _open_listener(host: str, port: int) -> socket.socket:
    """Open a socket that listens on one address.  ConfigError if that cannot be done."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"rank 0 cannot listen on {host} port {port}: {error}",
            code="address",
            expected="an address of this machine that the other ranks reach, and a free port",
            fix="Choose others with --master-addr and --master-port.",
        ) from None
