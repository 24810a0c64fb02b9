"""A rank that runs what rank 0 says: the same forwards, of the same model, without requests of its own.

What others build on (Ray, a script of one's own):

    from pymllm.follower import follow
    follow("path/to/model", rank=1, size=4, host="10.0.0.1", port=29500, key="a secret", device="cpu")

runs in any process, in its main thread or another, until rank 0 tells it to end, and then returns. The arguments after
`key` are those of `LLM`; ranks that would load something else are refused, on all sides, before a tensor is read. Where
rank 0 ends, however it does, or is silent for `SILENCE` seconds, the process of a follower ends at once (exit code
`LOST`): a thread that waits in a collective cannot be told otherwise. Rank 0 is

    llm = LLM("path/to/model", tensor_parallel_size=4, device="cpu",
              ranks=Ranks(host="10.0.0.1", port=29500, key="a secret", started=0))

which returns once all ranks have loaded. `llm.why_not_healthy()` is None, or why the ranks can answer no more: a rank
has ended, is silent, or has failed. It costs nothing; `llm.ping()` asks every rank and returns how many seconds ago
each was last heard of. What is lost stays lost: start all ranks again. `llm.close()` ends the followers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from pymllm.api import LLM
from pymllm.engine.following import Follower
from pymllm.errors import PymllmError
from pymllm.gpus import count_gpus
from pymllm.loading.agreement import describe_adapter
from pymllm.parallel.children import end_with_parent
from pymllm.parallel.leader import SILENCE
from pymllm.parallel.led import LOST, Led
from pymllm.parallel.place import Parallel
from pymllm.parallel.process_group import choose_gpu, join, leave_process_group

__all__ = ["LOST", "SILENCE", "follow"]


def follow(
    model: str | None = None,
    *,
    rank: int,
    size: int,
    host: str,
    port: int,
    key: str = "",
    local_rank: int | None = None,
    **options: Any,
) -> None:
    """Run rank `rank` of `size` until rank 0 says that it is over.

    model, options: as for `LLM`; without any, what rank 0 loads.  host, port: where rank 0 listens.
    key: what rank 0 demands.  local_rank: which of the machine's GPUs is used; None: the rank counts them through; a
    device of `options` that names one comes first.
    Raises RankError where rank 0 does not come or refuses this rank, and what loading raises. The process ends, with
    exit code LOST, if rank 0 is lost once it has been reached.
    """
    led = Led(rank, size, host, port, key)
    try:
        welcome, _ = led.next()
        try:
            if model is None and not options:
                model, options = welcome["settings"]["model"], welcome["settings"]["options"]
            if local_rank is None and count_gpus():
                local_rank = rank % count_gpus()
            gpu = choose_gpu(str(options.get("device", "auto")), local_rank)
            group = join(rank, size, host, int(welcome["store"]), welcome["backend"], gpu)
            whole = bool(options.get("expert_parallel", False))
            with Parallel(rank, size, group, whole, led=True, gpu=gpu):
                llm = LLM(model, **options)
            led.tell({"is": "ready"})
            _obey(led, llm)
        except Exception as error:
            led.tell(_failure(error))
            raise
        leave_process_group(alone=True)
    finally:
        led.close()


def _obey(led: Led, llm: LLM) -> None:
    """Run what rank 0 says, until it is over."""
    follower = Follower(llm.embedder.runner, llm.engine if llm.generates else None)
    while True:
        message, integers = led.next()
        what = message["do"]
        if what == "end":
            return
        if what == "adapter":
            led.tell({"is": "done", "error": _change_adapter(llm, message)})
        else:
            follower.obey(what, message, integers)


def _change_adapter(llm: LLM, message: Mapping[str, Any]) -> str | None:
    """Load, unload, merge or unmerge an adapter.  Returns the error, or None."""
    try:
        if (
            message["files"] is not None
            and (mine := describe_adapter(message["arguments"][1])) != message["files"]
        ):
            return f"rank 0 has {message['files']} of it, and this rank {mine}"
        getattr(llm, message["how"])(*message["arguments"])
    except PymllmError as error:
        return str(error)
    return None


def _failure(error: Exception) -> dict[str, Any]:
    """Make the message that tells rank 0 why this one has failed."""
    code = error.code if isinstance(error, PymllmError) else type(error).__name__
    said = str(error) if isinstance(error, PymllmError) else f"{type(error).__name__}: {error}"
    return {"is": "failed", "code": code, "reason": said}


def main() -> int:
    """Follow the rank 0 that has started this process.  Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pymllm.follower")
    for name in ("rank", "size", "port", "local-rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--host", required=True)
    args = parser.parse_args()
    parent = os.environ.pop("PYMLLM_RANK_PARENT", None)
    if parent is not None:
        end_with_parent(int(parent))
    # The process that has started this one ends it, once it needs it no more.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=f"rank {args.rank}: %(levelname)s %(message)s")
    key = os.environ.pop("PYMLLM_RANK_KEY", "")
    alone = "PYMLLM_RANK_SETTINGS" in os.environ
    told = json.loads(os.environ.pop("PYMLLM_RANK_SETTINGS", '{"model": null, "options": {}}'))
    try:
        follow(
            told["model"],
            rank=args.rank,
            size=args.size,
            host=args.host,
            port=args.port,
            key=key,
            local_rank=args.local_rank,
            **told["options"],
        )
    except PymllmError as error:
        # Rank 0 tells what it has been told; on another machine somebody else reads this.
        if alone or error.code in ("rank-refused", "rank-timeout"):
            print(f"error (rank {args.rank}): {error}", file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing is left to be done, and threads that still run must not be torn down under way.
    os._exit(code)
