"""Time a chat of several turns, with and without the reuse of what was computed in the turns before.

    python benchmarks/chat_turns.py [MODEL] [--turns 8] [--message 60] [--answer 32] [--threads 1] [--rounds 2]

Each turn's prompt is all tokens of the turns before and a new message. The two ways take turns, A B A B, with a chat
that is new in each round; medians are given. The script writes results/chat_turns.json and .md.
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

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    for name, default in (("turns", 8), ("message", 60), ("answer", 32), ("threads", 1), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = {"on": LLM(args.model, prefix_reuse=True), "off": LLM(args.model, prefix_reuse=False)}
    rounds: dict[str, list[list[dict[str, Any]]]] = {"on": [], "off": []}
    # The first round of each is a warm-up. Other messages make each round one that nobody has seen.
    for number in range(args.rounds + 1):
        for way, llm in ways.items():
            turns = chat(llm, args.turns, args.message, args.answer, seed=number)
            rounds[way] += [turns] if number else []
    report: dict[str, Any] = {
        "model": Path(args.model).name if args.model else "shipped",
        **{name: getattr(args, name) for name in ("turns", "message", "answer", "threads", "rounds")},
    }
    report["ways"] = {way: summarise(found) for way, found in rounds.items()}
    same = all(
        a["tokens"] == b["tokens"]
        for on, off in zip(rounds["on"], rounds["off"], strict=True)
        for a, b in zip(on, off, strict=True)
    )
    report["same_answers"] = same
    write(report)
    return 0


def chat(llm: LLM, turns: int, message: int, answer: int, seed: int) -> list[dict[str, Any]]:
    """Hold a chat.  Returns of each turn its prompt's tokens, those computed, and its seconds."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = llm.config.size("vocab_size")
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    history: list[int] = []
    measured = []
    for _ in range(turns):
        history += torch.randint(10, vocabulary, (message,), generator=draw).tolist()
        started, first, output = time.perf_counter(), 0.0, None
        for piece in llm.stream(history, params):
            first = first or time.perf_counter() - started
            output = piece.output
        assert output is not None
        measured.append(
            {
                "prompt": len(history),
                "computed": len(history) - output.cached_tokens,
                "first_token_s": first,
                "decode_tokens_per_second": output.decode_tokens_per_second,
                "seconds": time.perf_counter() - started,
                "tokens": list(output.token_ids),
            }
        )
        history += output.token_ids
    return measured


def summarise(rounds: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Take the median over the rounds, of each turn and of the whole chat."""
    turns = []
    for each in zip(*rounds, strict=True):
        row = {name: each[0][name] for name in ("prompt", "computed")}
        for name in ("first_token_s", "decode_tokens_per_second"):
            row[name] = round(statistics.median(turn[name] for turn in each), 4)
        turns.append(row)
    seconds = statistics.median(sum(turn["seconds"] for turn in each) for each in rounds)
    return {"seconds": round(seconds, 3), "turns": turns}


def write(report: dict[str, Any]) -> None:
    """Write JSON and Markdown, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "chat_turns.json").write_text(json.dumps(report, indent=1) + "\n")
    on, off = report["ways"]["on"], report["ways"]["off"]
    lines = [
        f"# A chat of {report['turns']} turns: {report['model']}, {report['threads']} thread(s)",
        "",
        f"Messages of {report['message']} tokens, answers of {report['answer']}; in all {on['seconds']} s with reuse, "
        f"{off['seconds']} s without; {'the same' if report['same_answers'] else 'NOT the same'} answers.",
        "",
        "| turn | prompt | computed, with reuse | first token, ms: with | without | decode, tokens/s: with | without |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number, (a, b) in enumerate(zip(on["turns"], off["turns"], strict=True), 1):
        lines.append(
            f"| {number} | {a['prompt']} | {a['computed']} | {1e3 * a['first_token_s']:.0f} | "
            f"{1e3 * b['first_token_s']:.0f} | {a['decode_tokens_per_second']:.0f} | "
            f"{b['decode_tokens_per_second']:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / "chat_turns.md").write_text(text)
    print(text)


if __name__ == "__main__":
    sys.exit(main())
