"""Attention by blocks on the CPU: the native kernel beside itself without blocks, and beside torch_sdpa.

    python benchmarks/cpu_block_attention.py [--threads 1] [--seconds 1] [--write]

32 query heads over 8 key heads of 128, bfloat16, shuffled pages of 16, as of a model of 4 to 8 B parameters. Two kinds
of steps: the last 512 tokens of a prompt are read, or each of some requests decodes one block. The ways take turns
(A B C D A B C D); a figure is the fastest call, in microseconds a token of one layer, as whatever else a machine does
only adds to it. On one thread it is the processor's time, without the turns of other processes. "one row" is a step
that decodes token by token, at the same length. Both kernels must agree before they are timed.
--write: write results/cpu_block_attention.json and .md.
"""

# R requests, L length of each after the step, N new tokens of each, B block size

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import roofline
import torch
from torch import Tensor

from pymllm.kernels.aten.attention import TorchAttention
from pymllm.kernels.attention import (
    PAGE_SIZE,
    AttentionKernel,
    AttentionProblem,
    AttentionStep,
    KVType,
    PagedKV,
)
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.native.attention import NativeAttention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
DTYPE = torch.bfloat16
PIECE = 512  # of a prompt
LENGTHS = (512, 2048, 8192)
BLOCKS = (4, 32)
PROBLEM = AttentionProblem(
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    value_head_dim=HEAD_DIM,
    scale=HEAD_DIM**-0.5,
    dtype=DTYPE,
    device=probe_device("cpu"),
    kv=KVType(DTYPE),
    block_causal=True,
)
WAYS = ("causal", "by blocks", "torch_sdpa", "one row")

Way = Callable[[], Tensor]


def pages_of(requests: int, length: int) -> tuple[PagedKV, Tensor]:
    """Make the pages of R requests, filled, and their page tables."""
    columns = length // PAGE_SIZE
    tables = torch.randperm(requests * columns).int().view(requests, columns)
    shape = (requests * columns, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    return PagedKV(PROBLEM.kv, torch.randn(shape).to(DTYPE), torch.randn(shape).to(DTYPE)), tables


def step_of(tables: Tensor, length: int, new: int, block: int) -> AttentionStep:
    requests = len(tables)
    return AttentionStep(
        cu_seqlens_q=torch.arange(requests + 1, dtype=torch.int32) * new,
        context_lens=torch.full((requests,), length, dtype=torch.int32),
        max_seqlen_q=new,
        max_seqlen_k=length,
        page_tables=tables,
        block_size=block,
        prefix_causal=False,
    )


def ways_of(cache: PagedKV, tables: Tensor, length: int, new: int, block: int) -> list[Way]:
    """Return the calls of a row, as WAYS has them."""

    def way(kernel: AttentionKernel, new: int, block: int) -> Way:
        tokens = len(tables) * new
        q = torch.randn(tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(DTYPE)
        step = step_of(tables, length, new, block)
        slots = torch.cat([step.slots(request, length - new) for request in range(len(tables))])
        k, v = cache.read(slots, DTYPE)
        return partial(kernel.run, PROBLEM, q, k, v, step, cache)

    ways = [
        way(NativeAttention(), new, 1),
        way(NativeAttention(), new, block),
        way(TorchAttention(), new, block),
        way(NativeAttention(), 1, 1),
    ]
    torch.testing.assert_close(ways[1]().float(), ways[2]().float(), atol=0.01, rtol=0.02)
    return ways


def fastest(ways: list[Way], seconds: float, clock: Callable[[], float]) -> list[float]:
    """Return the microseconds of each way's fastest call; they take turns, at least five times."""
    times: list[list[float]] = [[] for _ in ways]
    while len(times[0]) < 5 or sum(map(sum, times)) < seconds:
        for way, found in zip(ways, times, strict=True):
            started = clock()
            way()
            found.append((clock() - started) * 1e6)
    return [min(found) for found in times]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    info = roofline.machine()
    kind = "Microseconds of the processor" if options.threads == 1 else "Microseconds"
    lines = ["# Attention by blocks on the CPU", "", roofline.describe(info), ""]
    lines += [f"{kind} a token of one layer, the fastest call, {options.threads} thread(s), bfloat16.", ""]
    titles = (*WAYS[:3], "blocks over causal", "torch_sdpa over blocks", WAYS[3], "one row over blocks")
    lines += ["| step | requests | length | block | " + " | ".join(titles) + " |"]
    lines += ["| --- |" + " --- |" * (3 + len(titles))]
    print("\n".join(lines), flush=True)
    rows = []
    with torch.inference_mode():
        for title, requests in (("prompt", 1), ("block", 1), ("block", 8)):
            for length in LENGTHS:
                cache, tables = pages_of(requests, length)
                for block in BLOCKS:
                    new = PIECE if title == "prompt" else block
                    found = fastest(ways_of(cache, tables, length, new, block), options.seconds, clock)
                    tokens = [requests * new] * 3 + [requests]
                    us = [round(total / count, 2) for total, count in zip(found, tokens, strict=True)]
                    causal, blocks, sdpa, one = us
                    row = {"step": title, "requests": requests, "length": length, "block": block}
                    rows.append(row | dict(zip(WAYS, us, strict=True)))
                    cells = [causal, blocks, sdpa, round(blocks / causal, 2), round(sdpa / blocks, 1)]
                    cells += [one, round(one / blocks, 1)]
                    lines.append("| " + " | ".join(map(str, (*row.values(), *cells))) + " |")
                    print(lines[-1], flush=True)
    if options.write:
        result = {"machine": info, "threads": options.threads, "microseconds_a_token": rows}
        (roofline.RESULTS / "cpu_block_attention.json").write_text(json.dumps(result, indent=1) + "\n")
        (roofline.RESULTS / "cpu_block_attention.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
