"""Compare a page of ours with transformers' class as the model definition: the same checkpoint, kernels and engine.

    python benchmarks/generic_definition.py [--only "int4" ...] [--turns 5] [--models build/generic_definition]

The model is a Llama of 12 layers with random weights (cpu_decode_models.py writes it, once, about 0.7 GB under
--models). `LLM(definition="transformers")` runs transformers' class, with our layers in it, where "auto" runs
`pymllm/models/llama.py`. Both are loaded in one process, on one thread, and take turns, A B A B: prompts of 512 tokens,
then 64 decoded tokens of each, for one request and for eight. Times are those of the processor, as the machine may have
other work. The script writes results/generic_definition.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import roofline
import torch
from cpu_decode_models import CONFIG, model_folder

from pymllm import LLM, SamplingParams

RESULTS = roofline.RESULTS / "generic_definition.json"
PROMPT, STEPS, BATCHES = 512, 64, (1, 8)
DEFINITIONS = ("auto", "transformers")
# The checkpoint, and how it is run.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "int4": ("awq", {}),
    "bfloat16": ("float", {"dtype": "bfloat16"}),
    "float32": ("float", {"dtype": "float32"}),
}


def generate(llm: LLM, prompts: list[list[int]], steps: int) -> tuple[float, float]:
    """Generate greedily.  Returns the processor's seconds up to the first token of each, and from there on."""
    params = SamplingParams(max_tokens=steps + 1, ignore_eos=True)
    start, first, seen = time.process_time(), 0.0, set()
    for index, _ in llm.stream_all(prompts, params):
        seen.add(index)
        if not first and len(seen) == len(prompts):
            first = time.process_time()
    return first - start, time.process_time() - first


def measure(kind: str, models: Path, turns: int) -> list[dict[str, Any]]:
    """Measure a row for each batch: the medians of both, and the median of the ratios of their turns."""
    folder, options = KINDS[kind]
    path = model_folder(models, folder)
    llms = {
        name: LLM(path, device="cpu", prefix_reuse=False, max_model_len=1024, definition=name, **options)
        for name in DEFINITIONS
    }
    page, generic = (llm.logits(list(range(5, 69))) for llm in llms.values())
    difference = float((page - generic).norm() / page.norm())
    rows = []
    for batch in BATCHES:
        draw = np.random.default_rng(batch)
        prompts = draw.integers(3, CONFIG["vocab_size"], (batch, PROMPT)).tolist()
        for llm in llms.values():
            generate(llm, [prompt[:16] for prompt in prompts], 8)  # tapes are recorded
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in llms}
        for _ in range(turns):
            for name, llm in llms.items():
                found[name].append(generate(llm, prompts, STEPS))
        row: dict[str, Any] = {"kind": kind, "batch": batch, "turns": turns, "difference": difference}
        for at, (what, tokens) in enumerate((("prefill", batch * PROMPT), ("decode", batch * STEPS))):
            ours, theirs = ([turn[at] for turn in found[name]] for name in DEFINITIONS)
            row[f"{what}_page"] = tokens / statistics.median(ours)
            row[f"{what}_generic"] = tokens / statistics.median(theirs)
            row[f"{what}_ratio"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        row["load_average"] = round(os.getloadavg()[0], 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def render(found: dict[str, Any]) -> None:
    lines = [
        "# A page of ours, and transformers' class as the model definition",
        "",
        roofline.describe(found["machine"]),
        "",
        f"A Llama of {CONFIG['num_hidden_layers']} layers, hidden size {CONFIG['hidden_size']}; prompts of {PROMPT} "
        f"tokens, {STEPS} decoded tokens of each; one thread. Tokens a second of the processor's time, medians of "
        "paired turns; times: the generic definition's time over the page's, the median over the turns. Difference: of "
        "the logits after 64 tokens, in the norm.",
        "",
        "| weights | batch | prefill, page | generic | times | decode, page | generic | times | difference |",
        "| --- |" + " --- |" * 8,
    ]
    for row in found["rows"]:
        cells = [row["kind"], str(row["batch"])]
        for what in ("prefill", "decode"):
            cells += [f"{row[f'{what}_page']:.0f}", f"{row[f'{what}_generic']:.0f}"]
            cells += [f"**{row[f'{what}_ratio']:.2f}**"]
        lines.append(f"| {' | '.join([*cells, format(row['difference'], '.1e')])} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--models", type=Path, default=Path(__file__).parent.parent / "build" / "generic_definition"
    )
    options = parser.parse_args()
    CONFIG["num_hidden_layers"] = 12
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": []}
    machine = roofline.machine()
    for kind in options.only:
        measured = measure(kind, options.models, options.turns)
        if RESULTS.exists():
            found = json.loads(RESULTS.read_text())
        found["machine"] = machine
        kept = [row for row in found["rows"] if row["kind"] != kind]
        found["rows"] = sorted(
            kept + measured, key=lambda row: (list(KINDS).index(row["kind"]), row["batch"])
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    render(found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
