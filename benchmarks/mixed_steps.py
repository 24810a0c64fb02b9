"""Time steps in which some requests decode and one reads: both in one forward, or the decoding ones replayed apart.

    python benchmarks/mixed_steps.py [MODEL] [--threads 1] [--clients 1 4 8] [--chunks 16 64 256]

The two ways take turns, A B A B; a row has the median of each, in milliseconds. The engine goes the first way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from pymllm import LLM, SamplingParams

ROUNDS = 12


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(args.model, device="cpu", prefix_reuse=False)
    print("| decoding | tokens read | one forward, ms | replayed apart, ms |\n| --- | --- | --- | --- |")
    for clients in args.clients:
        for chunk in args.chunks:
            together, apart = time_steps(llm, clients, chunk)
            print(f"| {clients} | {chunk} | {together:.1f} | {apart:.1f} |", flush=True)
    return 0


def time_steps(llm: LLM, clients: int, chunk: int) -> tuple[float, float]:
    """Return the median milliseconds of a mixed step in both ways."""
    runner, engine = llm.engine.runner, llm.engine
    seconds: dict[bool, list[float]] = {False: [], True: []}
    params = SamplingParams(max_tokens=ROUNDS * 2 + 40, ignore_eos=True)
    with llm.session() as session:
        decoding = [session.add([5 + index] * 30, params) for index in range(clients)]
        for _ in range(6):
            session.step()
        for turn in range(2 * ROUNDS):
            reading = session.add([7] * chunk, SamplingParams(max_tokens=1))
            batch = engine.scheduler.schedule()
            assert len(batch) == len(decoding) + 1
            way = bool(turn % 2)
            started = time.perf_counter()
            if way:
                runner.step(batch[:-1], engine.cache).clone()
            runner.step(batch[-1:] if way else batch, engine.cache)
            seconds[way].append(time.perf_counter() - started)
            session.abort(reading)
            # The same tokens, in a step of their own, so that the requests go on.
            session.step()
    return tuple(1e3 * statistics.median(seconds[way]) for way in (False, True))  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
