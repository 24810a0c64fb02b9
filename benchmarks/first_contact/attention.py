"""Paged attention over keys and values that our kernel has stored, against the formula in float32."""

# T tokens, H query heads, Hkv key heads, D head size

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.attention import PAGE_SIZE, AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.reference.attention import ReferenceAttention
from pymllm.kernels.registry import select

from .place import Check, Place, Unit

FP8 = torch.float8_e4m3fn
KINDS = (KVType(torch.bfloat16), KVType(FP8, "static"), KVType(torch.int8, "token"), KVType(FP8, "token"))
# The length of each request after the step, and how many of its tokens are new.
STEPS = {
    "decode 1 of 5000": ([5000], 1),
    "decode 8 mixed": ([1, 17, 300, 1024, 77, 2000, 16, 640], 1),
    "prompt of 700": ([700], 700),
    "256 of 1500 beside 256 of 900": ([1500, 900], 256),
}
HEADS = ((32, 8, 128), (32, 32, 128), (64, 8, 64), (16, 8, 256), (28, 4, 128), (16, 16, 96))
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"sliding_window": 128}, {"soft_cap": 30.0}, {"sinks": True})
TOLERANCE = 1.5e-2  # the weights of a softmax are rounded too


@dataclass(frozen=True)
class Case:
    """What a kernel is given: q [T, H, D], the new k and v [T, Hkv, D], the step, the pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    step: AttentionStep
    cache: PagedKV
    sinks: Tensor | None


def units(place: Place) -> Iterator[Unit]:
    if place.rehearse:
        problem = _problem(place, (4, 2, 32), KINDS[1], torch.bfloat16)
        yield 0.0, "attention", partial(_checks, place, problem, {"decode": ([20, 5], 1)})
        return
    for index, heads in enumerate(HEADS):
        for kind in KINDS:
            problem = _problem(place, heads, kind, torch.bfloat16)
            yield 0.001 + index / 4, "attention", partial(_checks, place, problem, STEPS)
    for variant in VARIANTS[1:]:
        problem = _problem(place, HEADS[0], KINDS[0], torch.bfloat16, **variant)
        yield 1.0, "attention", partial(_checks, place, problem, STEPS)
    problem = _problem(place, HEADS[0], KVType(torch.float16), torch.float16)
    yield 1.5, "attention", partial(_checks, place, problem, STEPS)


def _problem(
    place: Place, heads: tuple[int, int, int], kind: KVType, dtype: torch.dtype, **more: Any
) -> AttentionProblem:
    num_heads, num_kv_heads, dim = heads
    return AttentionProblem(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        value_head_dim=dim,
        scale=dim**-0.5,
        dtype=dtype,
        device=place.device,
        kv=kind,
        **more,
    )


def _checks(
    place: Place, problem: AttentionProblem, steps: dict[str, tuple[list[int], int]]
) -> Iterator[Check]:
    """Yield a check for each step, by our own kernel; and by the chosen one, where that is another's."""
    ours = select("attention", problem, "triton_grouped").kernel
    chosen = select("attention", problem).kernel
    more = [f"window {problem.sliding_window}"] if problem.sliding_window else []
    more += [f"cap {problem.soft_cap}"] if problem.soft_cap else []
    more += ["sinks"] if problem.sinks else []
    heads = f"{problem.num_heads}/{problem.num_kv_heads} heads of {problem.head_dim}"
    for title, (lengths, new) in steps.items():
        for kernel in dict.fromkeys((ours, chosen)):
            name = ", ".join([title, heads, str(problem.kv), *more, kernel.name])

            def check(kernel: Any = kernel, lengths: list[int] = lengths, new: int = new) -> dict[str, Any]:
                case = make_case(place, problem, lengths, new)
                arguments = (problem, case.q, case.k, case.v, case.step, case.cache, case.sinks)
                expected = ReferenceAttention().run(*arguments)
                return place.compare(kernel.run(*arguments), expected, TOLERANCE)

            yield name, check


def make_case(place: Place, problem: AttentionProblem, lengths: list[int], new: int) -> Case:
    """Make requests of these lengths, of each of which the last `new` tokens are the step's, over shuffled pages."""
    where, dtype = place.torch_device, problem.dtype
    kv_heads, dim = problem.num_kv_heads, problem.head_dim
    news, pages = [min(new, length) for length in lengths], [-(-length // PAGE_SIZE) for length in lengths]
    order = iter(torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(order) for _ in range(count)] for count in pages]
    slots = [
        table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        for table, length in zip(tables, lengths, strict=True)
        for position in range(length)
    ]
    shape, kind = (sum(pages), PAGE_SIZE, kv_heads, dim), problem.kv
    of_scales = {"none": None, "static": (kv_heads,), "token": shape[:3]}[kind.scaling]
    stored = [torch.zeros(shape, dtype=kind.dtype, device=where) for _ in range(2)]
    scales = [None if of_scales is None else torch.full(of_scales, 0.02, device=where) for _ in range(2)]
    cache = PagedKV(kind, stored[0], stored[1], scales[0], scales[1])
    k, v = (place.randn(sum(lengths), kv_heads, dim, seed=seed, dtype=dtype) for seed in (2, 3))
    store = select("kv_store", problem).kernel
    store.run(problem, k, v, cache, AttentionStep(slot_mapping=torch.tensor(slots, device=where)))
    starts = [0, *accumulate(news)]
    ends = list(accumulate(lengths))
    rows = [row for end, count in zip(ends, news, strict=True) for row in range(end - count, end)]
    most = max(pages)

    def int32(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=where)

    step = AttentionStep(
        cu_seqlens_q=int32(starts),
        cu_seqlens_k=int32([0, *ends]),
        context_lens=int32(lengths),
        max_seqlen_q=max(news),
        max_seqlen_k=max(lengths),
        page_tables=int32([table + [0] * (most - len(table)) for table in tables]),
        query_starts=starts,
        lengths=lengths,
    )
    q = place.randn(starts[-1], problem.num_heads, dim, seed=4, dtype=dtype)
    sinks = place.randn(problem.num_heads, seed=5, dtype=torch.float32) if problem.sinks else None
    return Case(q, k[rows], v[rows], step, cache, sinks)
