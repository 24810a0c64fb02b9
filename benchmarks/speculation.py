"""Measure what drafts gain: decoding with and without speculation, on a prompt to copy from and on an ordinary one.

    python benchmarks/speculation.py [--model MODEL ...] [--strategy SPEC ...] [--batch 1 4] [--tokens 96] [--rounds 5]
        [--threads 1] [--rows]

model: as for `LLM`; left out: the shipped one.  strategy: what is measured beside autoregressive decoding, by default
prompt_lookup; draft_model:path=... is another.  Requests of a batch have different prompts. All ways take turns,
A B B A; the time is that of the processor from the first token of all requests to the last, so that others on the
machine disturb it less, and ratios are medians over the rounds, each of a round's own pair.

--rows: measure instead what a step of N rows costs, of a step of one row.

The script writes results/speculation.json and .md, or speculation_rows.*.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.request import Request

RESULTS = Path(__file__).parent / "results"

# What a text to copy from is made of: each request of a batch begins elsewhere.
FACTS = (
    "The old lighthouse on the northern cliff was built in 1871 by two brothers.",
    "Its lamp burned whale oil at first, and later gas from the harbour works.",
    "Every evening the keeper climbed ninety-four steps to wind the clockwork.",
    "In the winter of 1902 a storm broke three of its seven windows.",
    "A baker from the village carried bread to the keeper each Friday.",
    "Today the tower is a museum, and children count the steps aloud.",
)
ORDINARY = (
    "Once upon a time there was a",
    "The best way to learn how to swim is",
    "My grandmother told me a story about",
    "In the morning the whole town was",
)
ROWS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (4, 4), (8, 1), (8, 4), (16, 1), (16, 4))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=[None])
    parser.add_argument("--strategy", nargs="+", default=["prompt_lookup"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    for name, default in (("tokens", 96), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = [measure_rows(model) if args.rows else measure(model, args) for model in args.model]
    report = {"threads": args.threads, "tokens": args.tokens, "rounds": args.rounds, "models": measured}
    write(report, "speculation_rows" if args.rows else "speculation")
    return 0


def measure(model: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model: every prompt, batch and strategy."""
    names = ["autoregressive", *args.strategy]
    llms = {name: LLM(model, strategy=name) for name in names}
    cells = []
    for prompt in ("copy", "ordinary"):
        for batch in args.batch:
            prompts = [make_prompt(prompt, index) for index in range(batch)]
            rounds: list[dict[str, dict[str, Any]]] = []
            # The first round warms up: it records tapes.
            for number in range(args.rounds + 1):
                order = names if number % 2 else names[::-1]
                found = {name: run(llms[name], prompts, args.tokens) for name in order}
                rounds += [found] if number else []
            cells += [summarise(prompt, batch, name, names[0], rounds) for name in names]
    return {"model": name_of(model), "cells": cells}


def make_prompt(kind: str, index: int) -> str:
    """Make the prompt of one request of a batch."""
    if kind == "ordinary":
        return ORDINARY[index % len(ORDINARY)]
    first = index % len(FACTS)
    text = " ".join(FACTS[first:] + FACTS[:first])
    return f"{text}\n\n{text}\n\n{text[: len(text) // 6]}"


def run(llm: LLM, prompts: list[str], tokens: int) -> dict[str, Any]:
    """Answer prompts side by side.  Returns processor seconds, and counts, from when all have their first tokens."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with llm.session() as session:
        requests = [session.add(llm.encode(prompt), params) for prompt in prompts]
        while not all(request.answer for request in requests):
            session.step()
        before = sum(len(request.answer) for request in requests)
        started, forwards = time.process_time(), 0
        while session.unfinished:
            forwards += len(session.step())
        seconds = time.process_time() - started
    made = sum(len(request.answer) for request in requests) - before
    return {
        "seconds": seconds,
        "tokens": made,
        "forwards": forwards,
        "drafted": sum(request.drafted for request in requests),
        "accepted": sum(request.accepted for request in requests),
        "answers": [request.answer for request in requests],
    }


def summarise(
    prompt: str, batch: int, name: str, first: str, rounds: list[dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Take medians over the rounds of one cell; `gain` is over the first strategy, in the same round."""
    own = [found[name] for found in rounds]
    last = own[-1]
    return {
        "prompt": prompt,
        "batch": batch,
        "strategy": name,
        "tokens_per_second": round(statistics.median(r["tokens"] / r["seconds"] for r in own), 1),
        "gain": round(
            statistics.median(
                found[name]["tokens"]
                * found[first]["seconds"]
                / (found[name]["seconds"] * found[first]["tokens"])
                for found in rounds
            ),
            3,
        ),
        "tokens_per_forward": round(last["tokens"] / last["forwards"], 2),
        "drafted": last["drafted"],
        "accepted": last["accepted"],
        "same_answers": all(found[name]["answers"] == found[first]["answers"] for found in rounds),
    }


def measure_rows(model: str | None) -> dict[str, Any]:
    """Measure the steps of N requests of W tokens each, of 200 tokens of text, against one of one token."""
    llm = LLM(model)
    runner, cache = llm.engine.runner, llm.engine.cache
    taken = {}
    for count, width in ROWS:
        requests = []
        for _ in range(count):
            request = Request([5 + place % 50 for place in range(200)], SamplingParams(), 256)
            request.answer, request.computed = [7], 200
            request.pages = cache.allocate(cache.pages_for(256))
            request.start_step(1)
            request.running_sequence, request.rows = [7] * width, list(range(width))
            requests.append(request)
        seconds = []
        for step in range(30):
            started = time.process_time()
            runner.step(requests, cache)
            seconds += [time.process_time() - started] if step >= 6 else []
        taken[count, width] = statistics.median(seconds)
        for request in requests:
            cache.release(request.pages)
    cells = [
        {
            "requests": count,
            "width": width,
            "ms": round(1e3 * seconds, 2),
            "cost": round(seconds / taken[1, 1], 2),
        }
        for (count, width), seconds in taken.items()
    ]
    return {"model": name_of(model), "cells": cells}


def name_of(model: str | None) -> str:
    return Path(model).name if model else "shipped"


def write(report: dict[str, Any], name: str) -> None:
    """Write JSON and Markdown, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if name == "speculation":
        lines = [
            f"# Decoding with drafts, {report['threads']} thread(s)",
            "",
            f"{report['tokens']} tokens a request, processor time, medians of {report['rounds']} rounds.",
            "",
            "| model | prompt | batch | strategy | tokens/s | gain | tokens a forward | drafts kept | same answers |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {measured['model']} | {c['prompt']} | {c['batch']} | {c['strategy'].partition(':')[0]} | "
            f"{c['tokens_per_second']} | {c['gain']} | {c['tokens_per_forward']} | "
            f"{c['accepted']} of {c['drafted']} | {'yes' if c['same_answers'] else 'no'} |"
            for measured in report["models"]
            for c in measured["cells"]
        ]
    else:
        lines = [
            f"# What rows cost, {report['threads']} thread(s)",
            "",
            "| model | requests | tokens each | ms | of a step of one row |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {measured['model']} | {c['requests']} | {c['width']} | {c['ms']} | {c['cost']} |"
            for measured in report["models"]
            for c in measured["cells"]
        ]
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
