"""Hold chats with servers over the same GGUF file: ours, as it is and with prompt lookup, and llama.cpp's.

    python benchmarks/chat_beside_llama_cpp.py MODEL.gguf --llama-python PYTHON [--threads 2] [--rounds 3]

llama.cpp runs as the server of the package xllamacpp, with its own defaults, in the interpreter PYTHON that has it.
One client holds a chat of 8 turns; then 8 and 16 clients hold chats of two turns at the same time. Messages and answers
have fixed lengths, answers are greedy and stream. A cold first token is that of the last turn's prompt with other words
at its beginning, so that nothing of it was read before. The servers take turns, A B A B, with words that neither has
seen; the table has medians, and the ratio is the median of the rounds' ratios. The script writes
results/chat_beside_llama_cpp.json and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import roofline
from serving import served

RESULTS = Path(__file__).parent / "results"
TURNS, WORDS, ANSWER = 8, 45, 64  # turns of a chat, words of a message, tokens of an answer
CROWD_TURNS = 2
MODEL_NAME = "chat"
OURS: dict[str, tuple[str, ...]] = {"ours": (), "ours, prompt_lookup": ("--strategy", "prompt_lookup")}
THEIRS = "llama.cpp"
SERVER = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_parallel, p.n_ctx = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
server = x.Server(p)
import importlib.metadata
print("READY", server.listening_address, importlib.metadata.version("xllamacpp"), flush=True)
sys.stdin.read()
"""
WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father"
)
VOCABULARY = WORD_LIST.split(" ")


@contextlib.contextmanager
def llama_cpp(
    python: str, model: Path, threads: int, clients: int, context: int
) -> Iterator[tuple[str, str]]:
    """Run llama.cpp's server with room for so many clients.  Yields its address, and xllamacpp's version."""
    command = [python, "-c", SERVER, str(model), str(threads), str(clients), str(clients * context)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            ready = next(line for line in process.stdout if line.startswith("READY"))
            _, address, version = ready.split()
            yield f"{address}/v1", version
        finally:
            process.kill()


def message(draw: random.Random) -> str:
    """Make a user's message of random words."""
    return " ".join(draw.choice(VOCABULARY) for _ in range(WORDS)) + "?"


async def ask(
    http: httpx.AsyncClient, address: str, messages: Sequence[dict[str, str]]
) -> tuple[str, float, float]:
    """Stream an answer.  Returns its text, the seconds to its first piece of text, and those to its end."""
    body = {
        "model": MODEL_NAME,
        "messages": list(messages),
        "max_tokens": ANSWER,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with http.stream("POST", f"{address}/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            raise RuntimeError(f"{address}: {(await stream.aread()).decode()}")
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                if piece:
                    first = first or time.perf_counter() - started
                text += piece
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if tokens != ANSWER:
        raise RuntimeError(f"{address} answered {tokens} tokens, not {ANSWER}")
    return text, first, time.perf_counter() - started


async def chat(http: httpx.AsyncClient, address: str, seed: int, turns: int) -> dict[str, Any]:
    """Hold a chat.  Returns its seconds in all, and each turn's to the first token."""
    draw, history, firsts, seconds = random.Random(seed), [], [], 0.0
    for _ in range(turns):
        history.append({"role": "user", "content": message(draw)})
        text, first, took = await ask(http, address, history)
        history.append({"role": "assistant", "content": text})
        firsts.append(first)
        seconds += took
    return {"seconds": seconds, "first_token_s": firsts, "history": history}


def hold(address: str, seed: int) -> dict[str, Any]:
    """Hold one chat, and ask for a cold first token after as long a history."""

    async def run() -> dict[str, Any]:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600, limits=limits) as http:
            found = await chat(http, address, seed, TURNS)
            history = found.pop("history")[:-1]
            other = message(random.Random(-seed - 1))
            history[0] = {"role": "user", "content": other}
            _, found["cold_s"], _ = await ask(http, address, history)
            return found

    return asyncio.run(run())


def crowd(address: str, clients: int, seed: int) -> float:
    """Let clients hold chats at the same time.  Returns the tokens a second of all answers."""

    async def run() -> float:
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=600, limits=limits) as http:
            started = time.perf_counter()
            await asyncio.gather(
                *(chat(http, address, seed * 1000 + number, CROWD_TURNS) for number in range(clients))
            )
            return clients * CROWD_TURNS * ANSWER / (time.perf_counter() - started)

    return asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-python", required=True, help="the interpreter that has xllamacpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16])
    args = parser.parse_args()
    names = (*OURS, THEIRS)
    found: dict[str, Any] = {
        "machine": roofline.machine(),
        "model": args.model.name,
        "threads": args.threads,
        "rounds": args.rounds,
        "chat": {name: [] for name in names},
        "crowds": {str(clients): {name: [] for name in names} for clients in args.clients},
    }
    with contextlib.ExitStack() as stack:
        addresses = {
            name: stack.enter_context(
                served(
                    args.model,
                    args.threads,
                    ("--prefix-reuse", "on", "--model-name", MODEL_NAME, *arguments),
                )
            )
            for name, arguments in OURS.items()
        }
        addresses[THEIRS], found["xllamacpp"] = stack.enter_context(
            llama_cpp(args.llama_python, args.model, args.threads, max(args.clients), 2048)
        )
        for number in range(args.rounds + 1):
            for name, address in addresses.items():
                measured = hold(address, number)
                # The first round is a warm-up.
                found["chat"][name] += [measured] if number else []
        for clients in args.clients:
            for number in range(args.rounds):
                for name, address in addresses.items():
                    rate = crowd(address, clients, 100 * clients + number)
                    found["crowds"][str(clients)][name].append(rate)
    RESULTS.mkdir(exist_ok=True)
    page = describe(found)
    (RESULTS / "chat_beside_llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "chat_beside_llama_cpp.md").write_text(page)
    print(page)


def describe(found: dict[str, Any]) -> str:
    """Write the page."""

    def line(what: str, values: dict[str, list[float]], more_is_better: bool = False) -> str:
        cells = [f"{statistics.median(values[name]):.3g}" for name in (*OURS, THEIRS)]
        for name in OURS:
            pairs = zip(values[name], values[THEIRS], strict=True)
            ratio = statistics.median(x / y if more_is_better else y / x for x, y in pairs)
            cells.append(f"**{ratio:.2f}**")
        return f"| {what} | {' | '.join(cells)} |"

    def row(what: str, pick: Callable[[dict[str, Any]], float]) -> str:
        return line(what, {name: [pick(chat) for chat in chats] for name, chats in found["chat"].items()})

    heads = [*OURS, THEIRS, *(f"{name}: times as fast" for name in OURS)]
    lines = [
        "# Chats, server to server with llama.cpp",
        "",
        f"{roofline.describe(found['machine'])}",
        "",
        f"{found['model']}, {found['threads']} thread(s) each, xllamacpp {found['xllamacpp']}; messages of {WORDS} "
        f"words, answers of {ANSWER} tokens, greedy, streamed; {found['rounds']} rounds in turns, medians.",
        "",
        f"| | {' | '.join(heads)} |",
        "| --- |" + " --- |" * len(heads),
        row(f"a chat of {TURNS} turns, seconds in all", lambda chat: chat["seconds"]),
        row("first token of turn 1, s", lambda chat: chat["first_token_s"][0]),
        row(f"first token of turn {TURNS}, s", lambda chat: chat["first_token_s"][-1]),
        row("the same prompt cold: first token, s", lambda chat: chat["cold_s"]),
    ]
    for clients, rates in found["crowds"].items():
        lines.append(line(f"{clients} clients, {CROWD_TURNS} turns each: tokens/s of answers", rates, True))
    warm = statistics.median(
        chat["first_token_s"][-1] / chat["cold_s"] for chat in found["chat"][next(iter(OURS))]
    )
    lines += ["", f"Ours: the first token of turn {TURNS} takes {warm:.2f} of a cold one."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
