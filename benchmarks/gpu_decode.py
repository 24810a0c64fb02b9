"""Time decoding on the GPU: a whole model, with CUDA graphs and without, after its answers matched the CPU's.

    python benchmarks/gpu_decode.py [MODEL] [--batches 1 8 64] [--budget SECONDS] [--dry-run]

First the answers are compared with those of the CPU reference; no figure of wrong answers is written. MODEL is any
checkpoint, by default the shipped model. --dry-run plans the model for an sm90 and prints its kernels. The script
writes tokens per second to results/gpu_decode.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpu_roofline import BUDGET_S, GRACE_S, stop_after

from pymllm import LLM, SamplingParams
from pymllm.api import shipped_model
from pymllm.planning.make_plan import plan

RESULTS = Path(__file__).parent / "results"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
NEW_TOKENS = 128
LOGIT_TOLERANCE = 3e-2  # relative, of bfloat16 activations through all layers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(shipped_model()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds; rows beyond them are left out"
    )
    args = parser.parse_args(arguments)
    if args.dry_run:
        layers = plan(args.model, device="cuda:sm90").layers
        for (kind, kernel), count in Counter((layer.kind, layer.kernel) for layer in layers).items():
            print(f"{count:4d} x {kind:<10} {kernel}")
        return 0
    report: dict[str, Any] = {"model": Path(args.model).name, "rows": []}
    started = time.perf_counter()
    timer = stop_after(args.budget + GRACE_S, lambda: _write(report))
    settings: dict[str, Any] = {"dtype": "bfloat16", "compute": "exact", "prefix_reuse": False}
    gpu, cpu = LLM(args.model, device="cuda", **settings), LLM(args.model, device="cpu", **settings)
    found, expected = gpu.logits(PROMPT).float().cpu(), cpu.logits(PROMPT).float()
    error = float((found - expected).norm() / expected.norm())
    if not error <= LOGIT_TOLERANCE:
        print(f"the GPU's logits are off by {error:.4f}, more than {LOGIT_TOLERANCE}", file=sys.stderr)
        return 1
    report |= {"device": torch.cuda.get_device_name(), "logit_error": error}
    for batch in args.batches:
        for graphs in (True, False):
            if time.perf_counter() - started > args.budget:
                print(f"left out, as the time was up: {batch} requests, {'with' if graphs else 'no'} graphs")
                continue
            seconds = _time(gpu, batch, graphs)
            speed = round(batch * NEW_TOKENS / seconds, 1)
            report["rows"].append({"batch": batch, "graphs": graphs, "tokens_per_second": speed})
            print(report["rows"][-1], flush=True)
    timer.cancel()
    _write(report)
    return 0


def _write(report: dict[str, Any]) -> None:
    """Write JSON and Markdown, once there is a figure."""
    if not report["rows"]:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu_decode.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# Decoding on the GPU: {report['model']}",
        "",
        f"{report['device']}; logits differ from the CPU's by {report['logit_error']:.4f}.",
        "",
        "| requests | CUDA graphs | tokens a second |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {row['batch']} | {'yes' if row['graphs'] else 'no'} | {row['tokens_per_second']} |"
        for row in report["rows"]
    ]
    (RESULTS / "gpu_decode.md").write_text("\n".join(lines) + "\n")


def _time(llm: LLM, batch: int, graphs: bool) -> float:
    """Time NEW_TOKENS steps of `batch` requests, in seconds, after a first run that compiles and captures."""
    runner, params = llm.engine.runner, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    llm.generate([PROMPT] * batch, params)
    reason, runner.eager_reason = runner.eager_reason, runner.eager_reason if graphs else "asked to"
    torch.cuda.synchronize()
    started = time.perf_counter()
    llm.generate([PROMPT] * batch, params)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    runner.eager_reason = reason
    return seconds


if __name__ == "__main__":
    sys.exit(main())
