"""Measure where the time of our decoding and of our prompts goes, and what limits each part.

    python benchmarks/cpu_decode_parts.py [--threads 1 2] [--models build/cpu_decode]

The model is the 448 M Llama of cpu_decode.py. A decoding step is a tape of native calls (pymllm/engine/tape.py): each
call is played by itself, in order, so that it finds the caches as in a step, between probes of the read bandwidth. What
a step takes beyond its tape is Python. Prompts of 128 tokens run eagerly, and each native call is timed where it is
made; the speed of the linear layers, and what cpu_decode.json says of the peers, are shares of the probed int8 peak.
The script writes results/cpu_decode_parts.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
from cpu_decode import RESULTS as PEERS
from cpu_decode import weight_bytes
from cpu_decode_engines import Pymllm
from cpu_decode_models import linear_shapes

from pymllm import _native
from pymllm.engine import decoding as engine_decoding
from pymllm.engine.tape import Tape

NAMES = {
    "integer_linear": "linear layers",
    "attention": "attention",
    "store_kv": "storing keys and values",
    "rms_norm": "norms with residuals",
    "silu_and_mul": "silu·mul",
    "rotate": "rotary positions",
    "integer_gather": "embedding",
    "widen": "float32 logits",
    "copy_rows": "cosines and sines",
}
PROMPT, CONTEXT = 128, 32  # tokens decoded before the step that is taken apart


class Calls:
    """A watcher of every native function: the calls that the last tape noted down, and how long each function took."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.tape: Tape | None = None
        self.taped: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        for name in NAMES:
            setattr(_native, name, self._watched(name, getattr(_native, name)))
        record = engine_decoding.record

        def recorded(*given: Any) -> Any:
            self.noted.clear()
            self.tape = record(*given)
            self.taped = self.noted[: len(self.tape.native)]
            return self.tape

        engine_decoding.record = recorded

    def _watched(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            self.noted.append(name)
            start = time.perf_counter()
            function(*given)
            self.seconds[name] += time.perf_counter() - start

        return call


class TimedTape:
    """A tape's native calls, and how long they took in all."""

    def __init__(self, native: Any) -> None:
        self.native, self.seconds = native, 0.0

    def __len__(self) -> int:
        return len(self.native)

    def play(self, begin: int, end: int) -> None:
        start = time.perf_counter()
        self.native.play(begin, end)
        self.seconds += time.perf_counter() - start


def decoding(engine: Pymllm, calls: Calls, threads: int, repeats: int) -> list[str]:
    prompt = np.random.default_rng(1).integers(3, 32000, (1, PROMPT))
    engine.generate(prompt, CONTEXT)
    tape, names = calls.tape, calls.taped
    assert tape is not None and len(names) == len(tape.native) and not tape.operations
    read = roofline.ReadProbe(huge=True)
    each = np.zeros((repeats, len(names)))
    bandwidth, outside, steps = [], [], []
    for turn in range(repeats):
        bandwidth.append(read(8, threads))
        for i in range(len(names)):
            start = time.perf_counter()
            tape.native.play(i, i + 1)
            each[turn, i] = time.perf_counter() - start
        if turn % 4 == 0:
            tape.native = timed = TimedTape(tape.native)
            seconds = engine.generate(prompt, CONTEXT)[1]
            tape.native = timed.native
            steps.append(seconds / CONTEXT)
            outside.append((seconds - timed.seconds) / CONTEXT)
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in zip(names, np.median(each, axis=0), strict=True):
        parts[name] += seconds
    step, rest = statistics.median(steps), statistics.median(outside)
    rate, bytes_read = statistics.median(bandwidth), weight_bytes("pymllm int4")
    lines = [
        f"A token: {step * 1e3:.2f} ms ({1 / step:.0f} a second); {bytes_read / 1e6:.0f} MB of weights at the probed "
        f"{rate / 1e9:.1f} GB/s are {bytes_read / rate * 1e3:.2f} ms. The linear layers read "
        f"{bytes_read / parts['integer_linear'] / 1e9:.1f} GB/s.",
        "",
        "| part of a decoded token | calls | µs | share |",
        "| --- | --- | --- | --- |",
    ]
    for name in sorted(parts, key=parts.__getitem__, reverse=True):
        lines.append(
            f"| {NAMES[name]} | {names.count(name)} | {parts[name] * 1e6:.0f} | {parts[name] / step:.3f} |"
        )
    lines.append(f"| outside of native calls | | {rest * 1e6:.0f} | {rest / step:.3f} |")
    return lines


def prompts(engine: Pymllm, calls: Calls, threads: int, repeats: int) -> list[str]:
    operations = 2 * PROMPT * sum(outputs * inputs for outputs, inputs in linear_shapes().values())
    totals, peaks, parts = [], [], defaultdict(list)
    for turn in range(repeats):
        prompt = np.random.default_rng(turn).integers(3, 32000, (1, PROMPT))
        peaks.append(_native.roofline_int8(threads))
        calls.seconds.clear()
        totals.append(
            engine.generate(prompt, 1)[0]
        )  # the token after it is played from a tape, and not watched
        for name, seconds in calls.seconds.items():
            parts[name].append(seconds)
    peak, seconds = statistics.median(peaks), statistics.median(totals)
    linear = statistics.median(parts["integer_linear"])
    lines = [
        f"A prompt of {PROMPT}: {seconds * 1e3:.1f} ms ({PROMPT / seconds:.0f} tokens a second) for "
        f"{operations / 1e9:.0f} G int8 operations: {operations / seconds / peak:.2f} of the probed peak of "
        f"{peak / 1e12:.2f} T/s. The linear layers alone, quantising activations included: {linear * 1e3:.1f} ms, "
        f"{operations / linear / peak:.2f} of it.",
        "",
        "| part of a prompt | ms | share |",
        "| --- | --- | --- |",
        f"| linear layers | {linear * 1e3:.1f} | {linear / seconds:.3f} |",
    ]
    medians = {name: statistics.median(found) for name, found in parts.items() if name != "integer_linear"}
    for name in sorted(medians, key=medians.__getitem__, reverse=True):
        lines.append(f"| {NAMES[name]} | {medians[name] * 1e3:.2f} | {medians[name] / seconds:.3f} |")
    rest = seconds - linear - sum(medians.values())
    lines.append(f"| outside of native calls | {rest * 1e3:.2f} | {rest / seconds:.3f} |")
    if PEERS.exists():
        lines += ["", "| reads prompts at | tokens a second | of this int8 peak | twice that would be |"]
        lines += ["| --- | --- | --- | --- |"]
        for row in json.loads(PEERS.read_text())["rows"]:
            if row["threads"] == threads and row["batch"] == 1 and row["ours"] == "pymllm int4":
                share = row["prefill_peer"] * operations / PROMPT / peak
                lines.append(f"| {row['peer']} | {row['prefill_peer']:.0f} | {share:.2f} | {2 * share:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent.parent / "build" / "cpu_decode")
    options = parser.parse_args()
    calls = Calls()
    lines = ["# Where the time of decoding and of prompts goes", "", roofline.describe(roofline.machine())]
    for threads in options.threads:
        torch.set_num_threads(threads)
        engine = Pymllm(options.models, threads)
        lines += ["", f"## {threads} thread{'s' * (threads > 1)}", ""]
        lines += decoding(engine, calls, threads, options.repeats)
        lines += ["", *prompts(engine, calls, threads, max(5, options.repeats // 4))]
    (roofline.RESULTS / "cpu_decode_parts.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
