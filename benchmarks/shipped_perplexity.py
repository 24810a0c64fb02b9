"""Measure what rounding costs: perplexity of the shipped model on held-out source, by compute mode and KV cache method.

    python benchmarks/shipped_perplexity.py [--tokens 20000]

The text is modules of the standard library that the model was not trained on (HELD_OUT_MODULES of the training script
in examples/), in windows of 512 tokens. The script prints one table; it has no file of results, as the model comes with
the package.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import torch

import pymllm

MODULES = ("textwrap.py", "shlex.py", "calendar.py", "fractions.py", "sched.py", "statistics.py")
WINDOW = 512
RUNS = (
    ("exact", "float32", "none"),
    ("auto", "auto", "none"),
    ("auto", "bfloat16", "none"),
    ("exact", "float32", "bfloat16"),
    ("exact", "float32", "int8"),
    ("exact", "float32", "fp8"),
    ("exact", "float32", "fp8:scale=token"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20000)
    args = parser.parse_args()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((stdlib / name).read_text(encoding="utf-8") for name in MODULES)
    baseline = None
    columns = f"{'compute':<8} {'dtype':<9} {'KV cache':<16} {'kernel':<12}"
    print(f"{columns} {'nats/token':>10} {'perplexity':>10} {'change':>8}")
    for compute, dtype, kv_cache in RUNS:
        llm = pymllm.LLM(compute=compute, dtype=dtype, kv_cache=kv_cache)
        ids = llm.tokenizer.encode(text)[: args.tokens]
        loss = total = 0.0
        for start in range(0, len(ids) - 1, WINDOW):
            window = ids[start : start + WINDOW + 1]
            logits = llm.logits(window[:-1])
            loss += float(
                torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum")
            )
            total += len(window) - 1
        perplexity = math.exp(loss / total)
        baseline = baseline or perplexity
        kernel = llm.plan.layer("model.layers.0.self_attn.q_proj").kernel
        change = f"{perplexity / baseline - 1:+.2%}"
        columns = f"{compute:<8} {dtype:<9} {kv_cache:<16} {kernel:<12}"
        print(f"{columns} {loss / total:10.4f} {perplexity:10.3f} {change:>8}")


if __name__ == "__main__":
    main()
