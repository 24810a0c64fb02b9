"""Decoding on the GPU: the shipped model end to end, tokens a second from CUDA graphs and without, and against the CPU.

    python benchmarks/gpu_decode.py [MODEL] [--batches 1 8 64] [--dry-run]

First the answers are compared with those of the CPU reference; a figure of wrong answers is not written. MODEL is any
checkpoint. --dry-run plans the model for an sm90 and prints its kernels. Writes results/gpu_decode.json and .md.
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

from pymllm import LLM, SamplingParams
from pymllm.api import shipped_model
from pymllm.planning import plan

RESULTS = Path(__file__).parent / "results"
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
NEW_TOKENS = 128
LOGIT_TOLERANCE = 3e-2  # relative, of bfloat16 activations through all layers


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(shipped_model()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        layers = plan(args.model, device="cuda:sm90").layers
        for (kind, kernel), count in Counter((layer.kind, layer.kernel) for layer in layers).items():
            print(f"{count:4d} x {kind:<10} {kernel}")
        return 0
    settings: dict[str, Any] = {"dtype": "bfloat16", "compute": "exact"}
    gpu, cpu = LLM(args.model, device="cuda", **settings), LLM(args.model, device="cpu", **settings)
    found, expected = gpu.logits(PROMPT).float().cpu(), cpu.logits(PROMPT).float()
    error = float((found - expected).norm() / expected.norm())
    if not error <= LOGIT_TOLERANCE:
        print(f"the GPU's logits are off by {error:.4f}, more than {LOGIT_TOLERANCE}", file=sys.stderr)
        return 1
    rows = []
    for batch in args.batches:
        for graphs in (True, False):
            seconds = _time(gpu, batch, graphs)
            rows.append(
                {
                    "batch": batch,
                    "graphs": graphs,
                    "tokens_per_second": round(batch * NEW_TOKENS / seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    name = torch.cuda.get_device_name()
    report = {"device": name, "model": Path(args.model).name, "logit_error": error, "rows": rows}
    (RESULTS / "gpu_decode.json").write_text(json.dumps(report, indent=1) + "\n")
    lines = [
        f"# Decoding on the GPU: {Path(args.model).name}",
        "",
        f"{name}; logits differ from the CPU's by {error:.4f}.",
    ]
    lines += ["", "| requests | CUDA graphs | tokens a second |", "| --- | --- | --- |"]
    lines += [f"| {r['batch']} | {'yes' if r['graphs'] else 'no'} | {r['tokens_per_second']} |" for r in rows]
    (RESULTS / "gpu_decode.md").write_text("\n".join(lines) + "\n")
    return 0


def _time(llm: LLM, batch: int, graphs: bool) -> float:
    """Seconds of NEW_TOKENS steps of `batch` requests, after a first run that compiles and captures."""
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
