"""Time the steps in which a long prompt is read beside answers: pieces by time, beside pieces of up to 1024 tokens.

    python benchmarks/long_prompt.py [MODEL] [--tokens 900] [--streams 8] [--threads 1] [--step-ms 150]

For each way, with a model of its own: the longest step and the median one, and the time to the prompt's first token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from pymllm import LLM, SamplingParams

NO_LIMIT_MS = 1e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    for name, default in (("tokens", 900), ("streams", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=150.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| step, ms | longest, ms | median, ms | first token, s | pieces |\n| --- | --- | --- | --- | --- |"
    )
    for step_ms in (args.step_ms, NO_LIMIT_MS):
        llm = LLM(args.model, step_ms=step_ms, device="cpu")
        steps, pieces = read_beside(llm, args.streams, args.tokens)
        asked = f"{step_ms:g}" if step_ms < NO_LIMIT_MS else "no limit"
        print(
            f"| {asked} | {1e3 * max(steps):.0f} | {1e3 * statistics.median(steps):.0f} | {sum(steps):.2f} | "
            f"{len(pieces)} of {min(pieces)} to {max(pieces)} tokens |",
            flush=True,
        )
    return 0


def read_beside(llm: LLM, streams: int, tokens: int) -> tuple[list[float], list[int]]:
    """Read a prompt beside streams that have begun.  Returns the seconds and the piece of each step."""
    vocabulary = llm.config.size("vocab_size") - 10
    steps, pieces = [], []
    with llm.session() as session:
        for index in range(streams):
            session.add([10 + index] * 20, SamplingParams(max_tokens=500, ignore_eos=True))
        for _ in range(8):
            session.step()
        prompt = [10 + 7 * index * index % vocabulary for index in range(tokens)]
        late = session.add(prompt, SamplingParams(max_tokens=2))
        while not late.answer:
            started = time.perf_counter()
            session.step()
            steps.append(time.perf_counter() - started)
            pieces.append(len(late.running_sequence))
    return steps, pieces


if __name__ == "__main__":
    sys.exit(main())
