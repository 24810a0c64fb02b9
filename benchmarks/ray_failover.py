"""Kill the machine of one of two replicas under load, and count what its clients, and those of the other, lose.

    python benchmarks/ray_failover.py [MODEL] [--clients 8] [--tokens 200] [--rounds 3] [--results DIR]

Needs the extra `ray`. Three nodes of Ray run on this machine: one with Ray's proxy alone, and one for each replica.
Clients stream completions one after another; then every process of a replica's node gets SIGKILL. Ray starts another
replica on the node that is left, which has room for two. A request is lost if it ends in an error, and hung if
nothing comes for 30 seconds. The script writes DIR/ray_failover.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from pymllm.cli.ray_application import parse_command
from pymllm.cli.ray_serve import portable, running_replicas
from pymllm.cli.serve import make_app
from pymllm.server.ray_app import APP_NAME, Scale, application

RESULTS = Path(__file__).parent / "results"
PORT = 8197
URL = f"http://127.0.0.1:{PORT}"
HUNG_SECONDS = 30
GIVE_UP_SECONDS = 180
# How long the load lasts before the kill, and after all replicas run again.
BEFORE_SECONDS = AFTER_SECONDS = 4.0
POLL_SECONDS = 0.1


class Named:
    """An application whose answers say in a header which process gave them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def name(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-replica", str(os.getpid()).encode())]
            await send(message)

        await self.app(scope, receive, name)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    llm, app = make_app(args)
    return llm, Named(app)


@dataclass
class Asked:
    """A request: when it began and ended, which process answered, and how it ended: finished, lost or hung."""

    began: float
    ended: float = 0.0
    replica: int | None = None
    end: str = ""
    why: str = ""


@dataclass
class Round:
    """What one kill did.  killed: when.  dead: the process of the replica that was killed."""

    asked: list[Asked] = field(default_factory=list)
    killed: float = 0.0
    dead: int = 0
    running_again: float = 0.0

    def table(self) -> dict[str, Any]:
        under_way = [one for one in self.asked if one.began < self.killed < one.ended]
        there = [one for one in under_way if one.replica == self.dead]
        elsewhere = [one for one in under_way if one.replica not in (self.dead, None)]
        unanswered = [one for one in under_way if one.replica is None]
        later = [one for one in self.asked if one.began > self.killed]
        lost_later = [one for one in later if one.end != "finished"]
        old = {one.replica for one in self.asked if one.began < self.killed}
        new = [one.ended for one in later if one.end == "finished" and one.replica not in old]
        told = [one.ended - self.killed for one in there if one.end == "lost"]
        finished = [one.ended for one in later if one.end == "finished"]
        return {
            "requests": len(self.asked),
            "under way on the dead replica": len(there),
            "its requests lost": count(there, "lost"),
            "its requests hung": count(there, "hung"),
            "its clients told after, s, at most": max(told, default=None),
            "under way on the other replica": len(elsewhere),
            "the other's requests finished": count(elsewhere, "finished"),
            "under way, not yet answered by either": len(unanswered),
            "these finished": count(unanswered, "finished"),
            "begun after the kill": len(later),
            "these lost or hung": len(lost_later),
            "the last one lost began after, s": max(
                (one.began - self.killed for one in lost_later), default=None
            ),
            "first answer begun after the kill, s": min(finished, default=0) - self.killed,
            "two replicas run again, s": self.running_again - self.killed,
            "first answer of the new one, s": min(new) - self.killed if new else None,
        }


def count(asked: list[Asked], end: str) -> int:
    return sum(one.end == end for one in asked)


async def ask(client: httpx.AsyncClient, tokens: int, asked: Asked) -> None:
    """Stream one completion of so many tokens: the end of the text is made impossible."""
    body = {
        "prompt": "import os\n",
        "max_tokens": tokens,
        "stream": True,
        "logit_bias": {"0": -100, "2": -100},
    }
    try:
        async with client.stream("POST", f"{URL}/v1/completions", json=body) as response:
            if name := response.headers.get("x-replica"):
                asked.replica = int(name)
            done = False
            async for line in response.aiter_lines():
                done |= line == "data: [DONE]"
            asked.end = "finished" if done and response.status_code == 200 else "lost"
            asked.why = "" if asked.end == "finished" else f"status {response.status_code}, no end"
    except httpx.ReadTimeout:
        asked.end = "hung"
    except httpx.HTTPError as error:
        asked.end, asked.why = "lost", repr(error)
    asked.ended = time.monotonic()


async def keep_asking(client: httpx.AsyncClient, tokens: int, into: list[Asked], stop: asyncio.Event) -> None:
    while not stop.is_set():
        asked = Asked(time.monotonic())
        into.append(asked)
        await ask(client, tokens, asked)
        if asked.end != "finished":
            await asyncio.sleep(POLL_SECONDS)


def parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def processes_below(top: int) -> list[int]:
    """Return a process and all that it started."""
    parents = {int(path.name): parent_of(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found = [top]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


async def one_round(cluster: Cluster, workers: list[Any], clients: int, tokens: int) -> Round:
    """Ask, kill the node of the first worker, and ask on until the replicas run again."""
    result, stop = Round(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=HUNG_SECONDS, limits=limits) as client:
        # Through a fault of one connection others must not fail.
        tasks = [asyncio.create_task(keep_asking(client, tokens, result.asked, stop)) for _ in range(clients)]
        await asyncio.sleep(BEFORE_SECONDS)
        victim = workers[0]
        doomed = processes_below(victim.all_processes["raylet"][0].process.pid)
        replicas = {one.replica for one in result.asked if one.replica}
        assert len(replicas) == 2, f"expected answers of two replicas, found {replicas}"
        (result.dead,) = replicas & set(doomed)
        result.killed = time.monotonic()
        for process in doomed:
            os.kill(process, signal.SIGKILL)
        deadline = result.killed + GIVE_UP_SECONDS
        seen_less = False
        while time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
            running = await asyncio.to_thread(running_replicas)
            seen_less |= running < 2
            if seen_less and running == 2:
                break
        else:
            raise SystemExit(f"two replicas did not run again within {GIVE_UP_SECONDS} s")
        result.running_again = time.monotonic()
        await asyncio.sleep(AFTER_SECONDS)
        stop.set()
        await asyncio.gather(*tasks)
    cluster.remove_node(workers.pop(0), allow_graceful=False)
    return result


def run_round(args: argparse.Namespace) -> Round:
    """Start the cluster and two replicas, a node each, and have one round."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": PORT},
            logging_config={"log_level": "ERROR", "enable_access_log": False},
        )
        command = parse_command([*([args.model] if args.model else []), "--max-running", str(args.clients)])
        make = functools.partial(load, portable(command))
        scale = Scale(fewest=2, most=2, cpus=1)
        # While each node has room for one alone, Ray must use both.
        filler = ray.remote(num_cpus=1)(Filler).remote()
        ray.get(filler.ping.remote())
        workers.append(cluster.add_node(num_cpus=1))
        serve.run(
            application(make, scale, max_running=args.clients, max_waiting=args.clients),
            name=APP_NAME,
            route_prefix="/",
        )
        # The node that is left has room for the second replica as well.
        ray.kill(filler)
        workers.reverse()
        return asyncio.run(one_round(cluster, workers, args.clients, args.tokens))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


class Filler:
    """An actor that takes a CPU."""

    def ping(self) -> None:
        pass


def median(values: list[Any]) -> Any:
    numbers = [value for value in values if value is not None]
    return round(statistics.median(numbers), 2) if numbers else None


def write(tables: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Write the results.  Returns the table."""
    lines = [
        f"{len(tables)} rounds: {args.clients} clients, {args.tokens} tokens a request, model "
        f"{args.model or 'shipped'}, Ray {ray.__version__}, {os.cpu_count()} CPUs for all nodes together.",
        "",
        "| | " + " | ".join(f"round {number}" for number in range(1, len(tables) + 1)) + " | median |",
        "| --- |" + " ---: |" * (len(tables) + 1),
    ]
    for key in tables[0]:
        values = [table[key] for table in tables]
        shown = [
            "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
            for value in (*values, median(values))
        ]
        lines.append(f"| {key} | " + " | ".join(shown) + " |")
    text = "\n".join(lines) + "\n"
    args.results.mkdir(exist_ok=True)
    (args.results / "ray_failover.md").write_text(text)
    settings = {"clients": args.clients, "tokens": args.tokens, "ray": ray.__version__}
    document = {
        "settings": settings,
        "rounds": tables,
    }
    (args.results / "ray_failover.json").write_text(json.dumps(document, indent=2) + "\n")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    for name, default in (("clients", 8), ("tokens", 200), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    tables = []
    for _ in range(args.rounds):
        result = run_round(args)
        tables.append(result.table())
        print(json.dumps(tables[-1], indent=2), flush=True)
        for one in result.asked:
            if one.end == "lost":
                print(f"  lost: {one.why}, began {one.began - result.killed:+.2f} s", file=sys.stderr)
    print(write(tables, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
