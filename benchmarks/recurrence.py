"""The layers with a state a request: our kernels, the reference, and the torch functions of transformers, side by side.

    python benchmarks/recurrence.py [--threads 1] [--seconds 1] [--dtype bfloat16] [--write]

The ways take turns (A B C A B C); a figure is the fastest call of a layer, in milliseconds, as whatever else a machine
does only adds to it. On one thread these are the processor's, which do not count the turns of other processes. Sizes
are those of Qwen3.5 (gated delta rule: 16 key heads and 32 value heads of 128; convolution: 8192 channels, 4 tokens)
and of a Mamba 2 of 64 heads of 64, 8 groups and 128 states. Every call takes the state of another of 24 layers, as a
model's step does. transformers:
`torch_chunk_gated_delta_rule` and `torch_recurrent_gated_delta_rule`, `mamba2_chunk_scan` and
`mamba2_selective_state_update`, `causal_conv1d_fn` and `causal_conv1d_update`, which take a batch of requests.
--write: write results/recurrence.json and .md.
"""

# R requests, T new tokens of each

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import roofline
import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
from transformers.utils import logging

from pymllm.kernels.attention import AttentionStep
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.recurrence import CausalConvProblem, GatedDeltaProblem, Mamba2ScanProblem
from pymllm.kernels.registry import kernels_for, select

LAYERS = 24
BEFORE = 100  # tokens that a decoding request has
SHAPES = ((1, 1), (8, 1), (1, 64), (1, 512))  # R and T
HERE = probe_device("cpu")
DELTA = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128}
SCAN = {"num_heads": 64, "head_dim": 64, "num_groups": 8, "state_size": 128}
CONV = {"channels": 8192, "kernel_size": 4}

Way = Callable[[], object]


def step_of(requests: int, tokens: int) -> AttentionStep:
    return AttentionStep(
        cu_seqlens_q=torch.arange(requests + 1, dtype=torch.int32) * tokens,
        context_lens=torch.full((requests,), tokens + BEFORE, dtype=torch.int32),
        max_seqlen_q=tokens,
        state_slots=torch.arange(requests).flip(0).contiguous(),
    )


def ours(operation: Any, problem: Any, inputs: tuple[Any, ...], requests: int, tokens: int) -> list[Way]:
    """Return the chosen kernel's way and the reference's, each with states of its own."""
    step = step_of(requests, tokens)

    def way(kernel: Any) -> Way:
        states = itertools.cycle([torch.randn(requests, *problem.state_shape) * 0.1 for _ in range(LAYERS)])
        return lambda: kernel.run(problem, *inputs, next(states), step)

    return [way(select(operation, problem).kernel), way(kernels_for(operation)[-1])]


def gated_delta(requests: int, tokens: int, dtype: torch.dtype) -> list[Way]:
    problem = GatedDeltaProblem(**DELTA, dtype=dtype, device=HERE, normalise_eps=1e-6)
    count, keys, values = requests * tokens, problem.num_key_heads, problem.num_value_heads
    q, k = (torch.randn(count, keys, problem.key_dim).to(dtype) for _ in range(2))
    v = torch.randn(count, values, problem.value_dim).to(dtype)
    g, beta = -torch.rand(count, values), torch.rand(count, values).to(dtype)
    batch = [t.view(requests, tokens, *t.shape[1:]) for t in (q, k, v, g, beta)]
    states = itertools.cycle([torch.randn(requests, *problem.state_shape) * 0.1 for _ in range(LAYERS)])
    function = qwen.torch_recurrent_gated_delta_rule if tokens == 1 else qwen.torch_chunk_gated_delta_rule

    def theirs() -> object:
        return function(
            *batch, initial_state=next(states), output_final_state=True, use_qk_l2norm_in_kernel=True
        )

    return [*ours("gated_delta", problem, (q, k, v, g, beta), requests, tokens), theirs]


def mamba2_scan(requests: int, tokens: int, dtype: torch.dtype) -> list[Way]:
    problem = Mamba2ScanProblem(**SCAN, dtype=dtype, device=HERE)
    count, heads, size = requests * tokens, problem.num_heads, problem.head_dim
    x, dt = torch.randn(count, heads, size).to(dtype), torch.randn(count, heads).to(dtype)
    b, c = (torch.randn(count, problem.num_groups, problem.state_size).to(dtype) for _ in range(2))
    a, d, bias = -torch.rand(heads), torch.randn(heads).to(dtype), torch.randn(heads).to(dtype)
    states = itertools.cycle([torch.randn(requests, *problem.state_shape) * 0.1 for _ in range(LAYERS)])

    def prompt() -> object:
        inputs = (t.view(requests, tokens, *t.shape[1:]) for t in (x, dt))
        groups = (t.view(requests, tokens, *t.shape[1:]) for t in (b, c))
        return mamba2.mamba2_chunk_scan(
            *inputs,
            a,
            *groups,
            chunk_size=256,
            D=d,
            dt_bias=bias,
            dt_softplus=True,
            initial_states=next(states),
            return_final_states=True,
            dt_limit=problem.dt_limit,
        )

    def decode() -> object:
        wide = [t[:, None].expand(-1, size) for t in (d, bias)]
        states_of = a[:, None, None].expand(-1, size, problem.state_size)
        steps = dt[..., None].expand(-1, -1, size)
        return mamba2.mamba2_selective_state_update(
            next(states), x, steps, states_of, b, c, wide[0], z=None, dt_bias=wide[1], dt_softplus=True
        )

    theirs = decode if tokens == 1 else prompt
    return [*ours("mamba2_scan", problem, (x, dt, a, b, c, d, bias), requests, tokens), theirs]


def causal_conv(requests: int, tokens: int, dtype: torch.dtype) -> list[Way]:
    problem = CausalConvProblem(**CONV, dtype=dtype, device=HERE, activation="silu")
    channels, size = problem.channels, problem.kernel_size
    x = torch.randn(requests * tokens, channels).to(dtype)
    weight, bias = torch.randn(channels, size).to(dtype), torch.randn(channels).to(dtype)
    batch = x.view(requests, tokens, channels).transpose(1, 2)
    states = [torch.randn(requests, channels, size - 1).to(dtype) for _ in range(LAYERS)]
    there = itertools.cycle(states)

    def prompt() -> Tensor:
        state = next(there)
        inputs = torch.cat((state, batch), -1)
        state.copy_(inputs[..., 1 - size :])
        return qwen.causal_conv1d_fn(inputs, weight, bias, activation="silu")[..., -tokens:]

    def decode() -> Tensor:
        return qwen.causal_conv1d_update(batch, next(there), weight, bias, activation="silu")

    theirs = decode if tokens == 1 else prompt
    return [*ours("causal_conv", problem, (x, weight, bias), requests, tokens), theirs]


def fastest(ways: list[Way], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Return the milliseconds of each way's fastest call; they take turns, at least five times."""
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    while len(times[0]) < 5 or sum(map(sum, times)) < seconds:
        for way, found in zip(ways, times, strict=True):
            started = clock()
            way()
            found.append(clock() - started)
    return [round(min(found) * 1e3, 4) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    info = roofline.machine() | {"transformers": version("transformers")}
    lines = ["# Layers with a state a request", ""]
    lines += [f"{roofline.describe(info)} transformers {info['transformers']}.", ""]
    kind = "Milliseconds of the processor" if options.threads == 1 else "Milliseconds"
    lines += [f"{kind}, the fastest of a layer's calls, {options.threads} thread(s), {options.dtype}.", ""]
    lines += ["| operation | requests | new tokens | ours | reference | transformers | times as fast |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    print("\n".join(lines), flush=True)
    found = []
    with torch.inference_mode():
        for make in (gated_delta, mamba2_scan, causal_conv):
            for requests, tokens in SHAPES:
                ways = make(requests, tokens, getattr(torch, options.dtype))
                new, reference, theirs = fastest(ways, options.seconds, clock)
                row = {"operation": make.__name__, "requests": requests, "tokens": tokens}
                found.append(row | {"ms": new, "reference_ms": reference, "transformers_ms": theirs})
                cells = f"{new:.3f} | {reference:.3f} | {theirs:.3f} | {theirs / new:.1f}"
                lines.append(f"| {make.__name__} | {requests} | {tokens} | {cells} |")
                print(lines[-1], flush=True)
    if options.write:
        result = {"machine": info, "threads": options.threads, "dtype": options.dtype, "milliseconds": found}
        (roofline.RESULTS / "recurrence.json").write_text(json.dumps(result, indent=1) + "\n")
        (roofline.RESULTS / "recurrence.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
