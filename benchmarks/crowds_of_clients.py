"""Crowds of clients before `pymllm serve`: many streams, many connections at once, some that leave, and for long.

    python benchmarks/crowds_of_clients.py MODEL [--streams 64 200] [--connections 400 1000] [--minutes 10]
        [--tokens 32] [--leave 0.2] [--threads 1] [--write]

MODEL: a folder or a .gguf file.  It runs in float32, and exactly (`--compute exact`), so that an answer among others is
the answer alone, token for token; each prompt is answered alone first.

streams: so many clients at the same time, each with a stream of its own; a share of them (`--leave`) closes its
connection at a random token. Of the others each must end with a finish reason and the right text.
connections: so many clients connect at once, with a short request each. Each must be answered: 200 with the right text,
or 503 with a JSON error and Retry-After.
minutes: 64 clients ask and leave for so long, while the memory of the process is watched.

Meanwhile another client asks for /health, 10 times a second. At the end of each part the server must be as before: no
place taken, no page held, no request under way. `--write` writes results/crowds_of_clients.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import roofline

PROMPTS = [f"Write about the number {number} and what it is good for." for number in range(24)]
SHORT = 8  # tokens of an answer, where many connections come at once
PLACES = {"--max-running": 64, "--max-waiting": 192}
LATE = 120  # seconds after which a client has lost its answer


@dataclass
class Server:
    """A server in a process of its own."""

    host: str
    port: int
    pid: int

    def memory(self) -> int:
        """Bytes of the process that are in memory."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextlib.contextmanager
def serving(model: str, threads: int, *flags: str) -> Iterator[Server]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parent.parent), environment.get("PYTHONPATH")))
    )
    command = [sys.executable, "-m", "pymllm", "serve", model, "--port", "0"]
    command += ["--dtype", "float32", "--compute", "exact", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if address := re.search(r"http://([\d.]+):(\d+)/v1", line):
                break
        else:
            raise SystemExit("".join(lines))
        try:
            yield Server(address[1], int(address[2]), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SystemExit("the server did not end on SIGTERM") from None


@dataclass
class Answer:
    """What a client got.  times: when each piece of text came, after the request was sent; the first is the TTFT."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    text: str = ""
    finish: str | None = None
    times: list[float] = field(default_factory=list)


async def ask(
    server: Server, path: str, body: Mapping[str, Any] | None = None, leave_after: int | None = None
) -> Answer:
    """Send a request on a connection of its own.  leave_after: how many pieces of a stream the client waits for."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        return await asyncio.wait_for(_ask(reader, writer, server, path, body, leave_after), LATE)
    finally:
        writer.close()


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    server: Server,
    path: str,
    body: Mapping[str, Any] | None,
    leave_after: int | None,
) -> Answer:
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nContent-Length: {len(data)}\r\n\r\n"
    started = time.perf_counter()
    writer.write(head.encode() + data)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    answer = Answer(int(lines[0].split()[1]))
    answer.headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
    }
    if "content-length" in answer.headers:
        answer.body = await reader.readexactly(int(answer.headers["content-length"]))
        return answer
    async for event in _events(reader):
        if event == "[DONE]":
            break
        choice = json.loads(event)["choices"][0]
        if choice["text"]:
            answer.times.append(time.perf_counter() - started)
            answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish
        if leave_after is not None and len(answer.times) >= leave_after:
            break
    return answer


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the data of server-sent events in a chunked body."""
    pending = b""
    while size := int(await reader.readline(), 16):
        pending += (await reader.readexactly(size + 2))[:-2]
        *events, pending = pending.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:].decode()


def request(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


async def text_of(server: Server, prompt: str, tokens: int) -> str:
    answer = await ask(server, "/v1/completions", request(prompt, tokens))
    assert answer.status == 200, answer
    return str(json.loads(answer.body)["choices"][0]["text"])


class Health:
    """A client that asks for /health, 10 times a second, on a new connection each time."""

    def __init__(self, server: Server) -> None:
        self.server, self.seconds, self.wrong = server, [], 0  # type: ignore[var-annotated]

    async def watch(self) -> None:
        while True:
            started = time.perf_counter()
            answer = await ask(self.server, "/health")
            self.seconds.append(time.perf_counter() - started)
            self.wrong += answer.status != 200
            await asyncio.sleep(0.1)


async def watched(server: Server, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """Do a part of the run beside a client that asks for /health; then wait until nothing is left of it."""
    health = Health(server)
    watching = asyncio.ensure_future(health.watch())
    before, started = server.memory(), time.perf_counter()
    found = await work
    found["seconds"] = time.perf_counter() - started
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    found["health"] = {**percentiles(health.seconds), "asked": len(health.seconds), "not 200": health.wrong}
    left = await until_idle(server)
    return {**found, "memory_mb": [round(value / 1e6, 1) for value in (before, server.memory())], **left}


async def until_idle(server: Server) -> dict[str, float]:
    """Wait until the server holds nothing of anybody, for a while at most.  Returns what it holds."""
    names = ("pymllm:places_taken", "pymllm:requests_under_way", "vllm:num_requests_running")
    names += ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    for _ in range(100):
        text = (await ask(server, "/metrics")).body.decode()
        found = {
            name: float(match[1])
            for name in names
            if (match := re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        }
        if not any(found.values()):
            break
        await asyncio.sleep(0.1)
    assert len(found) == len(names), text
    return {"left": sum(found.values())}


async def streams(
    server: Server, expected: Mapping[str, str], clients: int, tokens: int, leave: float, seed: int = 0
) -> dict[str, Any]:
    """So many streams at the same time."""
    draw, answers, left, wrong = random.Random(seed), [], 0, Counter[str]()

    async def client(prompt: str, leave_after: int | None) -> None:
        nonlocal left
        try:
            body = request(prompt, tokens, stream=True)
            answer = await ask(server, "/v1/completions", body, leave_after)
        except Exception as error:
            wrong[f"lost: {type(error).__name__}"] += 1
            return
        if answer.status != 200:
            wrong[f"status {answer.status}"] += 1
        elif leave_after is not None:
            left += 1
        elif answer.finish != "length":
            wrong["no finish"] += 1
        elif answer.text != expected[prompt]:
            wrong["another text"] += 1
        else:
            answers.append(answer)

    plans = [
        (draw.choice(PROMPTS), draw.randrange(1, tokens) if draw.random() < leave else None)
        for _ in range(clients)
    ]
    await asyncio.gather(*(client(*plan) for plan in plans))
    gaps = [later - before for answer in answers for before, later in zip(answer.times, answer.times[1:])]  # noqa: B905
    return {
        "clients": clients,
        "right": len(answers),
        "left_early": left,
        "wrong": dict(wrong),
        "ttft": percentiles([answer.times[0] for answer in answers]),
        "gap": percentiles(gaps),
    }


async def connections(server: Server, expected: Mapping[str, str], clients: int) -> dict[str, Any]:
    """So many clients that connect at once."""
    outcomes: Counter[str] = Counter()
    seconds: list[float] = []

    async def client(number: int) -> None:
        prompt, started = PROMPTS[number % len(PROMPTS)], time.perf_counter()
        try:
            answer = await ask(server, "/v1/completions", request(prompt, SHORT))
        except Exception as error:
            outcomes[f"lost: {type(error).__name__}"] += 1
            return
        body = json.loads(answer.body)
        if answer.status == 200:
            outcomes["200" if body["choices"][0]["text"] == expected[prompt] else "another text"] += 1
            seconds.append(time.perf_counter() - started)
        elif answer.status == 503 and body["error"]["code"] and int(answer.headers["retry-after"]) > 0:
            outcomes["503"] += 1
        else:
            outcomes[f"status {answer.status}"] += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return {"clients": clients, "outcomes": dict(outcomes), "answered": percentiles(seconds)}


async def for_long(
    server: Server, expected: Mapping[str, str], minutes: float, tokens: int, leave: float
) -> dict[str, Any]:
    """Crowds of 64 streams, one after the other; the memory after each."""
    ends, memory, right, wrong = time.monotonic() + 60 * minutes, [], 0, Counter[str]()
    started = time.monotonic()
    while time.monotonic() < ends:
        found = await streams(server, expected, 64, tokens, leave, len(memory))
        memory.append((round(time.monotonic() - started), round(server.memory() / 1e6, 1)))
        right, wrong = right + found["right"], wrong + Counter(found["wrong"])
    fifth = [used for _, used in memory[len(memory) // 5 :]] or [0.0]
    return {
        "minutes": minutes,
        "crowds": len(memory),
        "right": right,
        "wrong": dict(wrong),
        "memory": memory,
        "growth_mb": round(fifth[-1] - fifth[0], 1),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    if len(seconds) == 1:
        return dict.fromkeys(("p50", "p95", "p99", "max"), round(seconds[0], 4))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    found = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(value, 4) for name, value in found.items()}


async def run(
    args: argparse.Namespace, flags: list[str], parts: Callable[..., AsyncIterator[Any]]
) -> list[Any]:
    rows = []
    with serving(args.model, args.threads, *flags) as server:
        longest = {prompt: await text_of(server, prompt, args.tokens) for prompt in PROMPTS}
        shortest = {prompt: await text_of(server, prompt, SHORT) for prompt in PROMPTS}
        async for row in parts(server, longest, shortest):
            rows.append(row)
            print(json.dumps({name: value for name, value in row.items() if name != "memory"}), flush=True)
    return rows


def cells(row: Mapping[str, Any], name: str, unit: float = 1000) -> str:
    found = row.get(name) or {}
    return " / ".join(f"{found[key] * unit:.0f}" for key in ("p50", "p95", "p99")) if found else "–"


def table(found: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    lines = [
        f"# Crowds of clients: {Path(args.model).stem}, float32, {args.threads} thread(s)",
        "",
        roofline.describe(found["machine"]),
        "",
        f"Answers of {args.tokens} tokens; {args.leave:.0%} of the streams are left at a random token. Times in ms: "
        "p50 / p95 / p99. Wrong: lost, without a finish reason, or with another text than alone.",
        "",
        "| streams | right | left early | wrong | first token | between tokens | /health |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["streams"]:
        wrong = sum(row["wrong"].values())
        lines.append(
            f"| {row['clients']} | {row['right']} | {row['left_early']} | {wrong} | {cells(row, 'ttft')} | "
            f"{cells(row, 'gap')} | {cells(row, 'health')} |"
        )
    lines += [
        "",
        f"Connections at once, with a request of {SHORT} tokens each, to 64 + 64 places:",
        "",
        "| connections | 200 | 503 with JSON and Retry-After | anything else | answered after | /health |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["connections"]:
        good = [row["outcomes"].get(status, 0) for status in ("200", "503")]
        lines.append(
            f"| {row['clients']} | {good[0]} | {good[1]} | {row['clients'] - sum(good)} | {cells(row, 'answered')} | "
            f"{cells(row, 'health')} |"
        )
    for row in found["long"]:
        lines += [
            "",
            f"{row['minutes']:g} minutes of crowds of 64: {row['right']} answers right, {sum(row['wrong'].values())} "
            f"wrong; memory grew by {row['growth_mb']} MB after the first fifth, from {row['memory_mb'][0]} MB.",
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, nargs="*", default=[64, 200])
    parser.add_argument("--connections", type=int, nargs="*", default=[400, 1000])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()

    async def of_streams(server: Server, expected: Any, _: Any) -> AsyncIterator[Any]:
        for clients in args.streams:
            work = streams(server, expected, clients, args.tokens, args.leave)
            yield {"kind": "streams", **await watched(server, work)}
        if args.minutes:
            work = for_long(server, expected, args.minutes, args.tokens, args.leave)
            yield {"kind": "long", **await watched(server, work)}

    async def of_connections(server: Server, _: Any, expected: Any) -> AsyncIterator[Any]:
        for clients in args.connections:
            yield {
                "kind": "connections",
                **await watched(server, connections(server, expected, clients)),
            }

    flags = [str(item) for pair in PLACES.items() for item in pair]
    rows = asyncio.run(run(args, flags, of_streams))
    rows += asyncio.run(run(args, [], of_connections)) if args.connections else []
    found = {
        "machine": roofline.machine(),
        "threads": args.threads,
        "tokens": args.tokens,
        **{kind: [row for row in rows if row["kind"] == kind] for kind in ("streams", "connections", "long")},
    }
    lines = table(found, args)
    print("\n".join(lines))
    if args.write:
        (roofline.RESULTS / "crowds_of_clients.md").write_text("\n".join(lines) + "\n")
        (roofline.RESULTS / "crowds_of_clients.json").write_text(json.dumps(found, indent=1) + "\n")
    lost = [row for row in rows if row["left"] or row["health"]["not 200"]]
    lost += [row for row in rows if row.get("wrong") or set(row.get("outcomes", {})) - {"200", "503"}]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
