"""Draw the plots of results/: cpu_linear.svg and cpu_decode.svg, from the JSON files beside them.  Needs matplotlib.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SHAPE, THREADS = [4096, 14336], 1
# One look for each name, ours the darkest.
COLOURS = {
    "ours": "black",
    "ours_exact": "dimgrey",
    "onnxruntime": "tab:blue",
    "openvino": "tab:orange",
    "torch_int4pack": "tab:green",
    "torch_f32": "tab:red",
    "torch_bf16": "tab:purple",
}


def plot_linear() -> None:
    """Plot the fraction of the machine's limit over the number of tokens, a line for each kernel."""
    rows = json.loads((RESULTS / "cpu_linear.json").read_text())["rows"]
    rows = [row for row in rows if row["shape"] == SHAPE and row["threads"] == THREADS]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for kernel in [name for name in COLOURS if any(row["kernel"] == name for row in rows)]:
        fractions: dict[int, list[float]] = {}
        for row in rows:
            if row["kernel"] == kernel:
                fractions.setdefault(row["tokens"], []).append(row["fraction"])
        tokens = sorted(fractions)
        values = [statistics.median(fractions[count]) for count in tokens]
        axes.plot(tokens, values, "o-", label=kernel, color=COLOURS[kernel])
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("tokens M")
    axes.set_ylabel("fraction of the limit")
    axes.set_title(f"int4 linear, O={SHAPE[0]}, I={SHAPE[1]}, group 128, 1 thread", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    save(figure, "cpu_linear.svg")


def plot_decode() -> None:
    """Plot tokens per second of every engine, ours beside each peer."""
    rows = json.loads((RESULTS / "cpu_decode.json").read_text())["rows"]
    threads = sorted({row["threads"] for row in rows})
    panels = [
        ("prefill", 1, "prefill 128"),
        ("decode", 1, "decode, batch 1"),
        ("decode", 8, "decode, batch 8"),
    ]
    figure, grid = plt.subplots(
        len(threads), len(panels), figsize=(9, 2.6 * len(threads)), squeeze=False, constrained_layout=True
    )
    for line, count in zip(grid, threads, strict=True):
        for axes, (what, batch, title) in zip(line, panels, strict=True):
            here = [row for row in rows if row["threads"] == count and row["batch"] == batch]
            places = range(len(here))
            axes.barh([p + 0.2 for p in places], [row[f"{what}_ours"] for row in here], 0.4, color="black")
            axes.barh([p - 0.2 for p in places], [row[f"{what}_peer"] for row in here], 0.4, color="tab:blue")
            axes.set_yticks(
                list(places), [row["peer"] if axes is line[0] else "" for row in here], fontsize=7
            )
            axes.set_title(f"{title}, {count} thread{'s' * (count > 1)}", fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
            for place, row in zip(places, here, strict=True):
                axes.text(row[f"{what}_ours"], place + 0.2, f" {ratio(row, what)}", va="center", fontsize=6)
            axes.margins(x=0.18)
    figure.suptitle("tokens a second: pymllm (black) beside each peer (blue)", fontsize=9)
    save(figure, "cpu_decode.svg")


def ratio(row: dict[str, Any], what: str) -> str:
    return f"{row[f'{what}_ratio']:.2f}x"


def save(figure: Any, name: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = name  # equal results, equal files
    figure.savefig(RESULTS / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    plot_linear()
    plot_decode()
