"""Measure what keeps an int4 linear layer over many tokens below the int8 peak.

    python benchmarks/cpu_linear_parts.py [--tokens 128 512] [--repeats 9]

Products of a group are summed in int32, then become floats and are multiplied by two scales: work that grows with the
number of groups, and not with their size. So the times of one layer at groups of 32, 64 and 128 tell what that costs
(by a line through the three), and a layer that fits into the L2 cache tells what waiting for weights costs. Runs take
turns with a probe of the peak, on one thread. The script writes results/cpu_linear_parts.md.
"""

from __future__ import annotations

import argparse
import statistics
import time

import roofline
import torch

from pymllm import _native
from pymllm.config import Execution
from pymllm.kernels.canonical import IntWeight
from pymllm.quantization.binding import BoundWeight, bind

GROUPS = (32, 64, 128)
SHAPES = {"16 sets of 4096 x 4096": (4096, 4096, 16), "1024 x 1024, in the L2 cache": (1024, 1024, 1)}


def layer(outputs: int, inputs: int, group: int) -> BoundWeight:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // group, dtype=torch.float16)
    zeros = torch.randint(0, 16, (outputs, inputs // group), dtype=torch.uint8)
    weight = IntWeight(codes, scales, zeros, 4, group)
    return bind(weight, Execution(dtype=torch.bfloat16, device="cpu", compute="auto"), "linear")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# What keeps an int4 linear over many tokens below the int8 peak", ""]
    lines += [
        roofline.describe(roofline.machine()),
        "",
        "Shares of the int8 peak probed between the runs.",
        "",
    ]
    lines += [
        "| layer | tokens | "
        + " | ".join(f"group {group}" for group in GROUPS)
        + " | without a group's end | a group's end, of the time at 128 |"
    ]
    lines += ["| --- |" + " --- |" * (len(GROUPS) + 3)]
    for name, (outputs, inputs, sets) in SHAPES.items():
        layers = {group: [layer(outputs, inputs, group) for _ in range(sets)] for group in GROUPS}
        for tokens in options.tokens:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            calls = max(1, 4096 * 4096 // (outputs * inputs) * 128 // tokens)
            found: dict[int, list[float]] = {group: [] for group in GROUPS}
            for turn in range(options.repeats):
                for group in GROUPS:
                    peak = _native.roofline_int8(1)
                    start = time.perf_counter()
                    for call in range(calls):
                        layers[group][(turn + call) % sets].run(x, None)
                    seconds = (time.perf_counter() - start) / calls
                    found[group].append(seconds * peak / (2 * tokens * outputs * inputs))
            over = {group: statistics.median(each) for group, each in found.items()}  # of the least time
            end = (over[32] - over[128]) / (128 / 32 - 1)  # a line through the outer two, over groups a row
            shares = " | ".join(f"{1 / over[group]:.2f}" for group in GROUPS)
            lines.append(
                f"| {name} | {tokens} | {shares} | {1 / (over[128] - end):.2f} | {end / over[128]:.2f} |"
            )
    (roofline.RESULTS / "cpu_linear_parts.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
