"""Hold `pymllm bench` beside llama.cpp on the same GGUF file: prefill of 512 tokens and decoding of 128, in turns.

    python benchmarks/bench_beside_llama_cpp.py MODEL.gguf --llama-python PYTHON [--threads 2] [--turns 5]

llama.cpp runs as the server of the package xllamacpp, in the interpreter PYTHON that has it, with its own defaults: the
package brings no llama-bench, so its figures are the server's own timings of 512 random tokens, and of 128 that it
decodes after one, with the choice of the likeliest token. The two take turns, A B A B; the table has means and standard
deviations, and the median of the turns' ratios. The script prints the table and writes it, with every turn, to
results/bench_beside_llama_cpp.md and .json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import roofline
import torch

import pymllm
from pymllm.measuring.bench import measure
from pymllm.measuring.cases import Case

READ, DECODED = 512, 128
SERVER = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1], 2048, 1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
server = x.Server(p)
import importlib.metadata
print("READY", server.listening_address, importlib.metadata.version("xllamacpp"), flush=True)
sys.stdin.read()
"""


def ask(address: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Let llama.cpp answer a prompt of ids to its full length, and return its timings."""
    body = {
        "prompt": prompt,
        "n_predict": tokens,
        "temperature": 0.0,
        "cache_prompt": False,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        timings: dict[str, Any] = json.load(answer)["timings"]
    return timings


def theirs(address: str, draw: random.Random, vocabulary: int) -> dict[str, float]:
    """Measure llama.cpp once: tokens a second of prefill and of decoding."""
    prompt = [draw.randrange(vocabulary) for _ in range(READ)]
    read, decoded = ask(address, prompt, 1), ask(address, prompt[:1], DECODED)
    if read["prompt_n"] != READ or decoded["predicted_n"] != DECODED:
        raise RuntimeError(f"llama.cpp ran other lengths: {read}, {decoded}")
    return {f"pp{READ}": read["prompt_per_second"], f"tg{DECODED}": decoded["predicted_per_second"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama-python", required=True, help="the interpreter that has xllamacpp")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    llm = pymllm.LLM(options.model, device="cpu", progress=False)
    cases = [
        Case(reads=reads, tokens=tokens, batch=1, threads=options.threads)
        for reads, tokens in ((True, READ), (False, DECODED))
    ]
    info, draw = roofline.machine(), random.Random(0)
    command = [options.llama_python, "-c", SERVER, str(options.model), str(options.threads)]
    turns: list[dict[str, dict[str, float]]] = []
    others = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        ready = next(line for line in process.stdout if line.startswith("READY"))
        _, address, version = ready.split()
        theirs(address, draw, llm.config.size("vocab_size"))  # to warm up; ours does so by itself
        for _ in range(options.turns):
            measured = measure(llm, cases, 1)
            ours = {row.case.name: row.mean for row in measured.rows}
            others.append(measured.other_cpus)
            time.sleep(0.1)  # idle threads of one side rest before the other begins
            turns.append({"ours": ours, "llama.cpp": theirs(address, draw, llm.config.size("vocab_size"))})
            time.sleep(0.1)
        process.stdin.close()
    lines = ["# `pymllm bench` beside llama.cpp", "", roofline.describe(info)]
    lines += [
        f"{options.model.name}, {options.threads} threads, xllamacpp {version}, pymllm {pymllm.__version__}, "
        f"{options.turns} turns.",
        "",
    ]
    if (busy := [taken for taken in others if taken is not None]) and max(busy) > 0.1:
        lines += [f"Other processes took {statistics.fmean(busy):.1f} CPUs while ours was measured.", ""]
    lines += ["| test | pymllm, tokens/s | llama.cpp, tokens/s | ratio |", "| --- | ---: | ---: | ---: |"]
    for case in cases:
        each = {side: [turn[side][case.name] for turn in turns] for side in ("ours", "llama.cpp")}
        shown = [f"{statistics.fmean(found):.1f} ± {statistics.pstdev(found):.1f}" for found in each.values()]
        ratio = statistics.median(a / b for a, b in zip(each["ours"], each["llama.cpp"], strict=True))
        lines.append(f"| {case.name} | {shown[0]} | {shown[1]} | {ratio:.2f} |")
    name = roofline.RESULTS / "bench_beside_llama_cpp"
    name.with_suffix(".md").write_text("\n".join(lines) + "\n")
    found = {
        "machine": info,
        "xllamacpp": version,
        "threads": options.threads,
        "other_cpus": others,
        "turns": turns,
    }
    name.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
