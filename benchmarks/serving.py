"""Time clients of one server at the same time, beside the bare batch, and beside requests that take turns.

    python benchmarks/serving.py [--clients 1 4 16] [--threads 1] [--models /tmp/pymllm-decode]

The Llama of cpu_decode.py (448 M parameters, int4) runs behind `pymllm serve` on a loopback socket: once as it is, once
with `--max-running 1`. Every client sends its next request when it has the answer to its last; prompts have 96 random
tokens, answers 64. The bare batch has the same prompts without a server: `LLM.generate` of as many as there are
clients, then of as many again, in a process of its own. All are measured in turns, A B C A B C. The script writes
results/serving.json and .md.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import roofline
from cpu_decode_models import CONFIG, model_folder

PROMPT, ANSWER, REQUESTS = 96, 64, 3  # tokens, tokens, requests of a client in a turn
SERVERS = {"shared steps": (), "in turn": ("--max-running", "1")}
BARE = """
import random, sys, time
from pymllm import LLM, SamplingParams
llm = LLM(sys.argv[1], prefix_reuse=False)
vocabulary, length, answer = llm.config.size("vocab_size"), int(sys.argv[2]), int(sys.argv[3])
params = SamplingParams(max_tokens=answer, ignore_eos=True)
print("READY", flush=True)
for line in sys.stdin:
    clients, rounds = map(int, line.split())
    draw, seconds = random.Random(7), 0.0
    for _ in range(rounds):
        prompts = [[draw.randrange(100, vocabulary) for _ in range(length)] for _ in range(clients)]
        started = time.perf_counter()
        llm.generate(prompts, params)
        seconds += time.perf_counter() - started
    print(clients * rounds * answer / seconds, flush=True)
"""


@contextlib.contextmanager
def served(folder: Path, threads: int, arguments: tuple[str, ...]) -> Iterator[str]:
    """Start a server in a process of its own.  Yields its address."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [
        sys.executable,
        "-m",
        "pymllm",
        "serve",
        str(folder),
        "--port",
        "0",
        "--prefix-reuse",
        "off",
        *arguments,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if address := re.search(r"http://\S+/v1", line):
                    break
            else:
                raise SystemExit("".join(lines))
            yield address[0]
        finally:
            process.kill()


@contextlib.contextmanager
def bare(folder: Path, threads: int) -> Iterator[Callable[[int, int], float]]:
    """Load the model in a process of its own.  Yields what runs batches there, and returns tokens a second."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    command = [sys.executable, "-c", BARE, str(folder), str(PROMPT), str(ANSWER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        wish, answer = process.stdin, process.stdout

        def run(clients: int, rounds: int) -> float:
            wish.write(f"{clients} {rounds}\n")
            wish.flush()
            return float(answer.readline())

        try:
            answer.readline()
            yield run
        finally:
            process.kill()


async def turn(address: str, clients: int, requests: int) -> tuple[float, list[float]]:
    """Tokens a second over all clients, and every request's seconds."""
    seconds: list[float] = []

    async def client(http: httpx.AsyncClient, number: int) -> None:
        draw = random.Random(number)
        for _ in range(requests):
            prompt = [draw.randrange(100, CONFIG["vocab_size"]) for _ in range(PROMPT)]
            body = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "logit_bias": {"2": -100}}
            started = time.perf_counter()
            answer = await http.post(f"{address}/completions", json=body)
            seconds.append(time.perf_counter() - started)
            assert answer.json()["usage"]["completion_tokens"] == ANSWER, answer.text

    async with httpx.AsyncClient(timeout=600) as http:
        started = time.perf_counter()
        await asyncio.gather(*(client(http, number) for number in range(clients)))
        return clients * requests * ANSWER / (time.perf_counter() - started), seconds


def measure(
    addresses: dict[str, str], batch: Callable[[int, int], float], clients: int, turns: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in addresses}
    batches: list[float] = []
    latencies: dict[str, list[float]] = {name: [] for name in addresses}
    for _ in range(turns):
        for name, address in addresses.items():
            rate, seconds = asyncio.run(turn(address, clients, REQUESTS))
            rates[name].append(rate)
            latencies[name] += seconds
        batches.append(batch(clients, REQUESTS))
    row: dict[str, Any] = {"clients": clients}
    for name in addresses:
        row[name] = {
            "tokens_per_s": statistics.median(rates[name]),
            "median_s": statistics.median(latencies[name]),
            "slowest_s": max(latencies[name]),
        }
    row["ratio"] = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
    row["bare"] = statistics.median(batches)
    shared = next(iter(rates.values()))
    row["of_bare"] = statistics.median(a / b for a, b in zip(shared, batches, strict=True))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--models", type=Path, default=Path("/tmp/pymllm-decode"))
    options = parser.parse_args()
    folder, info = model_folder(options.models, "awq"), roofline.machine()
    with contextlib.ExitStack() as stack:
        addresses = {
            name: stack.enter_context(served(folder, options.threads, arguments))
            for name, arguments in SERVERS.items()
        }
        for address in addresses.values():
            asyncio.run(turn(address, 1, 1))  # records the decoding step
        batch = stack.enter_context(bare(folder, options.threads))
        batch(1, 1)
        rows = [measure(addresses, batch, clients, options.turns) for clients in options.clients]
    lines = [
        "# Clients at the same time: a Llama of 448 M parameters, int4 group 128, behind the server",
        "",
        roofline.describe(info),
        "",
        f"{options.threads} thread(s); prompts of {PROMPT} tokens, answers of {ANSWER}; {options.turns} turns of "
        f"{REQUESTS} requests a client, A B A B. Tokens a second: of the answers, over all clients, HTTP and prompts "
        "included. A request: the median, and the slowest.",
        "",
        "| clients | shared steps: tokens/s | a request | in turn: tokens/s | a request | ratio | bare batch | "
        "shared steps of it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [
            f"{row[name]['tokens_per_s']:.0f} | {row[name]['median_s']:.2f} / {row[name]['slowest_s']:.2f} s"
            for name in SERVERS
        ]
        lines.append(
            f"| {row['clients']} | {cells[0]} | {cells[1]} | **{row['ratio']:.2f}** | "
            f"{row['bare']:.0f} | **{row['of_bare']:.2f}** |"
        )
    (roofline.RESULTS / "serving.md").write_text("\n".join(lines) + "\n")
    (roofline.RESULTS / "serving.json").write_text(
        json.dumps({"machine": info, "threads": options.threads, "rows": rows}, indent=1) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
