"""Measure what this machine can do at most: read bandwidth, float32 and int8 arithmetic, for each number of threads.

    python benchmarks/roofline.py [--threads 1 2] [--repeats 15]

The script writes results/roofline.json and .md beside this file. The probes are in pymllm/kernels/limits.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pymllm import _native
from pymllm.kernels.limits import ReadProbe, machine
from pymllm.kernels.native.extension import probe

__all__ = ["RESULTS", "ReadProbe", "describe", "machine"]

RESULTS = Path(__file__).parent / "results"
READS = {
    "read, 1 stream, 4 KiB pages": (1, False),
    "read, 8 streams, 4 KiB pages": (8, False),
    "read, 1 stream, huge pages": (1, True),
    "read, 8 streams, huge pages": (8, True),
}


def describe(info: dict[str, Any]) -> str:
    """Write one line for the head of a table."""
    mib = {name: f"{(info[name] or 0) / 2**20:g} MiB" for name in ("l2_bytes", "l3_bytes")}
    return (
        f"{info['cpu']}, {info['logical_cpus']} CPUs, path {info['path']}, L2 {mib['l2_bytes']}, L3 {mib['l3_bytes']}, "
        f"Python {info['python']}, torch {info['torch']}; load average at the start {info['load_average']}."
    )


def measure(threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure name -> median and best, in GB/s or GOP/s; the probes take turns."""
    reads = {huge: ReadProbe(huge=huge) for huge in (False, True)}

    def read(streams: int, huge: bool) -> Callable[[], float]:
        return lambda: reads[huge](streams, threads)

    probes = {name: read(*how) for name, how in READS.items()}
    probes["float32 multiply-add"] = lambda: _native.roofline_f32(threads)
    probes["u8 × s8, summed in int32"] = lambda: _native.roofline_int8(threads)
    samples: dict[str, list[float]] = {name: [] for name in probes}
    for _ in range(repeats):
        for name, run in probes.items():
            samples[name].append(run() / 1e9)
    return {name: {"median": statistics.median(found), "best": max(found)} for name, found in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, probe().logical_cpus}))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    info = machine()
    results = {str(threads): measure(threads, options.repeats) for threads in options.threads}

    lines = ["# Limits of the machine", "", describe(info), ""]
    lines += ["Median (best); reads in GB/s, arithmetic in GOP/s, a multiply-add being two operations.", ""]
    lines += ["| | " + " | ".join(f"{threads} threads" for threads in options.threads) + " |"]
    lines += ["| --- |" + " --- |" * len(options.threads)]
    for name in next(iter(results.values())):
        row = [results[str(threads)][name] for threads in options.threads]
        lines.append(
            f"| {name} | " + " | ".join(f"{cell['median']:.1f} ({cell['best']:.1f})" for cell in row) + " |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "roofline.json").write_text(json.dumps({"machine": info, "threads": results}, indent=1) + "\n")
    (RESULTS / "roofline.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
