"""Choosing the next tokens of a step: all rows by one kernel, beside the way before, each row on its own in torch.

    python benchmarks/sampling.py [--threads 1] [--seconds 0.4] [--rows 1 16 64] [--sizes 4096 32000 128000] [--write]

The two ways take turns (A B A B); a figure is the median milliseconds of a step, of logits that a trained model could
give: few are high. none: greedy without settings. greedy: with log-probabilities of two tokens. defaults: what the
shipped model recommends. all: every setting at once, after a text of 1000 tokens. --write: write results/sampling.json
and .md.
"""

# R rows, V vocabulary

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import roofline
import torch
from torch import Tensor

from pymllm import SamplingParams
from pymllm.engine.choosing import SamplerState, choose
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import select
from pymllm.kernels.sampling import SamplingProblem

TEXT = 1000  # tokens of each prompt
ANSWER = 64

SETTINGS = {
    "none": {},
    "greedy": {"logprobs": 2},
    "defaults": {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1},
    "all": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "logit_bias": ((7, 1.0), (11, -100.0)),
        "logprobs": 5,
    },
}


def before(
    logits: Tensor, params: SamplingParams, prompt: list[int], answer: list[int], generator: torch.Generator
) -> int:
    """Choose one row's token as pymllm did before it had a kernel for it."""
    logits = logits.float()
    if params.logprobs is not None:
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(params.logprobs)
        list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    if params.logit_bias:
        logits = logits.clone()
        for token, bias in params.logit_bias:
            logits[token] += bias
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*{*prompt, *answer}])
        values, penalty = logits[seen], params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))
    if answer and (params.frequency_penalty or params.presence_penalty):
        counts = torch.bincount(torch.tensor(answer), minlength=logits.numel()).float()
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0).float()
    if params.greedy:
        return int(logits.argmax())
    logits, tokens = cut_before(logits / params.temperature, params)
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    number = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    chosen = min(int(torch.searchsorted(sums, number, right=True)), len(sums) - 1)
    return chosen if tokens is None else int(tokens[chosen])


def cut_before(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Cut tokens off by top_k, min_p and top_p as pymllm did before."""
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    if params.top_p == 1:
        return logits, None
    total = logits.logsumexp(-1)
    for count in (min(1024, logits.numel()), logits.numel()):
        best = logits.topk(count)
        mass = (best.values - total).exp().double()
        running = mass.cumsum(-1) - mass
        if running[-1] >= params.top_p:
            break
    kept = running < params.top_p
    return best.values[kept], best.indices[kept]


def medians(ways: list[Callable[[], object]], seconds: float) -> list[float]:
    """Return the median milliseconds of each way; they take turns, at least three times."""
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    while len(times[0]) < 3 or sum(map(sum, times)) < seconds:
        for way, found in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            found.append(time.perf_counter() - started)
    return [statistics.median(found) * 1e3 for found in times]


def measure(rows: int, size: int, settings: dict[str, object], seconds: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, size, generator=generator) * 2
    logits[:, :: size // 64] += torch.rand(rows, len(range(0, size, size // 64)), generator=generator) * 14
    params = SamplingParams(seed=1, **settings)  # type: ignore[arg-type]
    prompts = torch.randint(size, (rows, TEXT), generator=generator).tolist()
    answers = torch.randint(size, (rows, ANSWER), generator=generator).tolist()
    states = [SamplerState(params, prompt) for prompt in prompts]
    kernel = select("sampling", SamplingProblem(probe_device("cpu"))).kernel

    def one_by_one() -> list[int]:
        if all([state.params.takes_likeliest for state in states]):
            return logits.detach().float().numpy().argmax(-1).tolist()
        return [
            before(row, params, p, a, generator) for row, p, a in zip(logits, prompts, answers, strict=True)
        ]

    old, new = medians([one_by_one, lambda: choose(logits, states, answers, kernel)], seconds)
    return {"before_ms": round(old, 3), "ms": round(new, 3), "times": round(old / new, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each figure")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 32000, 128000])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    info = roofline.machine()
    lines = ["# Choosing the next tokens of a step", "", roofline.describe(info), ""]
    lines += [f"Median milliseconds, {options.threads} thread(s): before / now (how many times as fast).", ""]
    lines += [f"| rows | V | {' | '.join(SETTINGS)} |", "| --- | --- |" + " --- |" * len(SETTINGS)]
    print("\n".join(lines), flush=True)
    found = {}
    for rows in options.rows:
        for size in options.sizes:
            cells = {
                name: measure(rows, size, settings, options.seconds) for name, settings in SETTINGS.items()
            }
            found[f"{rows}x{size}"] = cells
            shown = [
                f"{cell['before_ms']:.2f} / {cell['ms']:.2f} ({cell['times']:.1f})" for cell in cells.values()
            ]
            lines.append(f"| {rows} | {size} | {' | '.join(shown)} |")
            print(lines[-1], flush=True)
    if options.write:
        result = {"machine": info, "threads": options.threads, "milliseconds": found}
        (roofline.RESULTS / "sampling.json").write_text(json.dumps(result, indent=1) + "\n")
        (roofline.RESULTS / "sampling.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
