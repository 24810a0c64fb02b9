"""Measure what calibration is worth: held-out loss of the shipped model, quantised again with and without it.

    python benchmarks/calibration_loss.py [--tokens 8000]

The script writes the blocks of the shipped model (int4 with zero points) as int4 g128 symmetric: rounded to nearest, by
GPTQ, and by AWQ's searches, on 8,192 tokens of modules of the standard library. The loss is measured on other modules,
which the model was not trained on either. The script prints one table, which docs/quantizing.md quotes, and takes about
three minutes.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch

import pymllm
from pymllm.api import shipped_model

CALIBRATION = (
    "argparse.py",
    "ast.py",
    "asyncio/base_events.py",
    "collections/__init__.py",
    "dataclasses.py",
    "email/message.py",
    "http/client.py",
)
HELD_OUT = ("textwrap.py", "shlex.py", "calendar.py", "fractions.py", "sched.py", "statistics.py")
RULES = {"model.layers.**": "int4:group_size=128,symmetric=true"}
WINDOW = 512


def read(names: tuple[str, ...]) -> str:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((stdlib / name).read_text(encoding="utf-8") for name in names)


def loss_of(folder: Path, count: int) -> float:
    """Compute the loss in nats per token, in float32."""
    llm = pymllm.LLM(folder, dtype="float32", progress=False)
    ids = llm.tokenizer.encode(read(HELD_OUT))[:count]
    loss = total = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1]
        logits, targets = llm.logits(window[:-1]), torch.tensor(window[1:])
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        total += len(window) - 1
    return loss / total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8000)
    args = parser.parse_args()
    print(f"{'as shipped':<20} {loss_of(shipped_model(), args.tokens):.4f}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "calibration.txt"
        text.write_text(read(CALIBRATION), encoding="utf-8")
        calibrated = {"calibrate": text, "calibration_tokens": 8192}
        for name, options in (
            ("rounded to nearest", {}),
            ("gptq", {**calibrated, "algorithm": "gptq"}),
            ("gptq --act-order", {**calibrated, "algorithm": "gptq", "act_order": True}),
            ("awq", {**calibrated, "algorithm": "awq"}),
        ):
            folder = Path(scratch) / name.replace(" ", "")
            pymllm.quantize_checkpoint(shipped_model(), folder, RULES, progress=False, **options)
            print(f"{name:<20} {loss_of(folder, args.tokens):.4f}", flush=True)


if __name__ == "__main__":
    main()
