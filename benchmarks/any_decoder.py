"""Run a tiny checkpoint of every decoder type that transformers knows, and compare logits and answers with its own.

    python benchmarks/any_decoder.py [TYPE ...] [--wrappers] [--processes N] [--write]

The checkpoints (tests/generic/zoo.py) are random and have every scalar of their config away from its default. Each type
is made twice: with and without a tied head, the tied one with YaRN positions where the type has rotary ones. A row has
the largest difference of the logits of three prompts, of 5 to 34 tokens, in float32 (in units of the largest logit,
where that is below 1); whether the three greedy answers, batched, are the same; and what `**=int8` at load reached. A
type that pymllm refuses has its reason, and one that transformers cannot make or run without an image says that. Each
type has a process of its own, so that a crash or a hang is a row, too. The script prints a table; --write also puts it
into results/any_decoder.md and .json, where rows of given types replace those of before.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

import pymllm
from pymllm.errors import PymllmError
from tests.generic import zoo

TOLERANCE = 1e-4
SECONDS = 120  # of one row
# Relative: rounding turns the choice of experts in tiny random models; the answers of another model give 1.4.
INT8_ERROR = 1.0


def compare(model_type: str, tied: bool, folder: Path) -> dict[str, Any]:
    """Make the type's checkpoint, run it, and return its row."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"type": model_type, "tied": tied}
    try:
        expected = zoo.write(zoo.make(model_type, tied=tied), folder)
    except Exception as error:
        return row | {"verdict": "not made", "reason": describe(error)}
    row |= {"moved": len(expected["moved"]), "lead": expected["lead"]}
    try:
        llm = pymllm.LLM(folder, device="cpu", dtype="float32", compute="exact", progress=False)
    except PymllmError as error:
        return row | {"verdict": "refused", "reason": describe(error)}
    row |= {
        "definition": getattr(llm.model, "definition", "its page"),
        "notes": list(getattr(llm.model, "notes", [])),
    }
    error = max(
        distance(llm.logits(ids), logits)
        for ids, logits in zip(expected["prompts"], expected["logits"], strict=True)
    )
    sampling = pymllm.SamplingParams(max_tokens=zoo.TOKENS, temperature=0.0, ignore_eos=True)
    answers = [list(answer.token_ids) for answer in llm.generate(expected["prompts"], sampling)]
    row |= {"error": error, "greedy": answers == expected["answers"]}
    row |= reach_of_int8(folder, expected)
    exact = error <= TOLERANCE and row["greedy"] and row["int8"] == "all"
    return row | {"verdict": "exact" if exact else "wrong"}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, in units of the largest logit where that is below 1.  [T, V] each."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / min(1.0, float(expected.abs().max())))


def reach_of_int8(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Load with **=int8 and say what it reached: "all", or which layers are in something else."""
    try:
        llm = pymllm.LLM(folder, ["**=int8"], device="cpu", dtype="float32", compute="exact", progress=False)
    except PymllmError as error:
        return {"int8": f"refused: {describe(error)}", "int8_error": None}
    layers = [
        layer for layer in llm.plan.weighted_layers if layer.kind != "router"
    ]  # which only a name reaches
    left = [f"{layer.prefix} ({layer.method})" for layer in layers if layer.method != "int8"]
    found, logits = llm.logits(expected["prompts"][0]), expected["logits"][0]
    error = float((found - logits).norm() / logits.norm())
    if left:
        said = f"{len(left)} left out: {', '.join(left[:3])}"
    elif not 0 < error <= INT8_ERROR:
        said = f"logits differ by {error:.2g}"
    else:
        said = "all"
    return {"int8": said, "int8_error": error, "layers": len(layers)}


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        text[:300]
        if isinstance(error, (PymllmError, zoo.NotADecoder))
        else f"{type(error).__name__}: {text}"[:300]
    )


def child(model_type: str, tied: bool, folder: Path, answer: Connection) -> None:
    """Send the row of a type, whatever happens."""
    try:
        row = compare(model_type, tied, folder)
    except BaseException as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        place = "" if frame is None else f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        row = {
            "type": model_type,
            "tied": tied,
            "verdict": "failed",
            "reason": f"{describe(error)} ({place})",
        }
    answer.send(row)


def run_all(jobs: list[tuple[str, bool]], processes: int, scratch: Path) -> list[dict[str, Any]]:
    """Run each job in a process of its own, some at a time, each for at most SECONDS."""
    fork, waiting = multiprocessing.get_context("fork"), list(reversed(jobs))
    running: dict[Connection, tuple[Any, tuple[str, bool], float]] = {}
    rows: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < processes:
            job = waiting.pop()
            receiver, sender = fork.Pipe(duplex=False)
            folder = scratch / f"{job[0]}-{'tied' if job[1] else 'untied'}"
            process = fork.Process(target=child, args=(*job, folder, sender))
            process.start()
            sender.close()
            running[receiver] = (process, job, time.monotonic())
        for receiver in wait(list(running), timeout=1.0) or [
            r for r, (_, _, started) in running.items() if time.monotonic() - started > SECONDS
        ]:
            process, (model_type, tied), started = running.pop(receiver)  # type: ignore[index]
            row = {"type": model_type, "tied": tied, "verdict": "failed"}
            try:
                row = receiver.recv() if receiver.poll() else row | {"reason": f"no end in {SECONDS} s"}
            except EOFError:
                process.join()
                row["reason"] = f"the process ended with {process.exitcode}"
            process.kill()
            process.join()
            row["seconds"] = round(time.monotonic() - started, 1)
            rows.append(row)
            print(line_of(row), flush=True)
    return sorted(rows, key=lambda row: jobs.index((row["type"], row["tied"])))


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    error = f"{row['error']:.1e}" if "error" in row else ""
    greedy = {True: "equal", False: "other", None: ""}[row.get("greedy")]
    why = row.get("reason") or "; ".join(row.get("notes", []))
    cells = (
        row["type"],
        "tied" if row["tied"] else "own",
        row["verdict"],
        row.get("moved", ""),
        error,
        greedy,
        row.get("int8", ""),
        why.replace("|", "/"),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; none: all")
    parser.add_argument(
        "--wrappers", action="store_true", help="also types of AutoModelForImageTextToText alone"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    types = args.types or zoo.model_types()[: None if args.wrappers else zoo.CAUSAL]
    jobs = [(t, tied) for t in types for tied in (False, True)]
    head = [
        "| type | head | verdict | settings moved | logits | greedy | `**=int8` | reason, or how it runs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(head))
    with tempfile.TemporaryDirectory() as scratch:
        for model_type in ("mixtral", "mamba2"):  # imports once for all what each needs
            compare(model_type, False, Path(scratch) / model_type)
        rows = run_all(jobs, args.processes, Path(scratch))
    results = Path(__file__).parent / "results"
    if args.write and args.types:  # into what was measured before
        kept = json.loads((results / "any_decoder.json").read_text())
        fresh = {(row["type"], row["tied"]): row for row in rows}
        rows = [fresh.pop((row["type"], row["tied"]), row) for row in kept] + list(fresh.values())
    made = [row for row in rows if row["verdict"] != "not made"]
    summary = summarize(rows)
    print(summary)
    if args.write:
        (results / "any_decoder.json").write_text(json.dumps(rows, indent=1) + "\n")
        intro = (__doc__ or "").split("\n\n")
        table = "\n".join([*head, *map(line_of, made)])
        unmade = "\n".join(
            f"- {row['type']}: {row['reason']}" for row in rows if row not in made and not row["tied"]
        )
        (results / "any_decoder.md").write_text(
            f"# Any decoder\n\n{intro[0]}\n`python benchmarks/any_decoder.py --write`\n\n{intro[2].strip()}\n\n"
            f"{summary}\n\n"
            f"{table}\n\nNot made by transformers {transformers.__version__}, or not without an image:\n\n{unmade}\n"
        )


def summarize(rows: list[dict[str, Any]]) -> str:
    """Say of how many types all rows are exact."""
    verdicts: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        verdicts[row["type"]].add(row["verdict"])
    lines = []
    causal = set(zoo.model_types()[: zoo.CAUSAL])
    for what, types in (("of AutoModelForCausalLM", causal), ("that read text beside images", None)):
        chosen = {t: v for t, v in verdicts.items() if (t in causal) == (types is not None)}
        made = {t: v for t, v in chosen.items() if v != {"not made"}}
        exact = sum(v == {"exact"} for v in made.values())
        if chosen:
            lines.append(
                f"{exact} of {len(made)} types {what} are exact with both heads "
                f"({len(chosen) - len(made)} more cannot be made)."
            )
    return " ".join(lines)


if __name__ == "__main__":
    main()
