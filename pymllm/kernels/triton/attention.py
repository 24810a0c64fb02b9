"""Paged attention in Triton: decoding divided over the keys, prompts in blocks of tokens, every kind of cache.

Heads that share a key head are rows of one tile ("triton_grouped"), so keys and values are read once for all of them;
"triton" takes each head by itself. Products over 8-bit caches are of float16, in which codes are exact: bfloat16
queries are rounded to it, each row scaled by a power of two. The host does not wait for the device: the numbers of
blocks and splits follow from `max_seqlen_q`, `max_seqlen_k` and the number of requests alone, so a CUDA graph serves
any requests within these.
"""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.hardware import Device
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.attention_kernels import attend, join_splits
from pymllm.kernels.triton.launch import interpreting
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import (
    Tile,
    architecture_of,
    bucket,
    divide,
    multiplies_from_registers,
    next_power,
    tuned,
)

FAMILY = "attention"
LARGEST_HEAD = 256
LEAST_KEYS = 256  # of one split
EIGHT_BIT = (torch.float8_e4m3fn, torch.int8)
WHOLE = 2**30  # a block of so many positions is all of any request
WINDOW_BOTH_WAYS = "has windows that reach back, not forward too"


class TritonGroupedAttention:
    """Attention with all query heads of a key head in one tile."""

    name = "triton_grouped"
    device_type = "cuda"  # the only one it runs on
    capturable = True
    reads_pages = True  # not k and v, where there is a cache

    def group(self, problem: AttentionProblem) -> int:
        """Return the number of query heads in one tile."""
        return problem.num_heads // problem.num_kv_heads

    def why_not(self, problem: AttentionProblem) -> str | None:
        if problem.dtype not in FLOATS:
            return f"computes with float16 or bfloat16, not {problem.dtype}"
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads are not a multiple of {problem.num_kv_heads} key heads"
        if max(problem.head_dim, problem.value_head_dim) > LARGEST_HEAD:
            return f"takes heads of up to {LARGEST_HEAD}, not {problem.head_dim}"
        if problem.bidirectional and problem.sliding_window is not None:
            return WINDOW_BOTH_WAYS
        if self.group(problem) > 64:
            return f"takes up to 64 heads to a key head, not {self.group(problem)}"
        if problem.kv.dtype not in (*FLOATS, *EIGHT_BIT):
            return f"reads float16, bfloat16, fp8 and int8 caches, not {problem.kv}"
        return why_not_device(problem.device)

    def run(
        self,
        problem: AttentionProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: AttentionStep,
        cache: PagedKV | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        requests, tokens, heads = step.num_reqs, q.shape[0], problem.num_heads
        group, dv = self.group(problem), problem.value_head_dim
        if q.is_cpu:  # the interpreter reads what it finds at addresses
            step.check_tokens(tokens)
            for request in range(0 if cache is None else requests):
                step.slots(request, 0, cache.k.shape[0])  # type: ignore[union-attr]
        y = q.new_empty((tokens, heads, dv))
        starts, lengths, pages, status, holes, hole_ends = step.once(
            ("on device", q.device), lambda: _on_device(step, q.device)
        )
        tile = choose_tile(problem, step, group)
        members = next_power(group)
        splits, block_tokens = tile.splits, tile.tokens // members
        sums = most = total = None
        if splits > 1:
            sums = q.new_empty((splits, tokens, heads, dv), dtype=torch.float32)
            most, total = (q.new_empty((splits, tokens, heads), dtype=torch.float32) for _ in range(2))
        if cache is None:
            keys, values, key_scale, value_scale = k, v, None, None
        else:
            keys, values = (pages_of.flatten(0, 1) for pages_of in (cache.k, cache.v))
            key_scale, value_scale = cache.k_scale, cache.v_scale
        q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
        words = _in_words(keys, problem.head_dim) and _in_words(values, dv)
        codes = _codes_of(problem, keys.dtype, words)
        if keys.dtype is torch.float8_e4m3fn:
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        if words:
            keys, values = keys.view(torch.int32), values.view(torch.int32)
        scaling = "none" if cache is None else cache.type.scaling
        grid = (requests, divide(max(step.max_seqlen_q, 1), block_tokens), heads // group * splits)
        attend.launch(
            grid,
            q,
            keys,
            values,
            key_scale,
            value_scale,
            sinks,
            y if sums is None else sums,
            most,
            total,
            starts,
            lengths,
            pages if cache is not None else None,
            status,
            holes,
            hole_ends,
            q.stride(0),
            q.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            0 if pages is None else pages.stride(0),
            tokens,
            WHOLE if problem.bidirectional else step.block_size,
            float(problem.scale),
            float(problem.soft_cap or 1.0),
            heads,
            problem.num_kv_heads,
            GROUP=group,
            SHARED=problem.num_heads // problem.num_kv_heads,
            D=problem.head_dim,
            DV=dv,
            PAGE=0 if cache is None else cache.page_size,
            WINDOW=problem.sliding_window or 0,
            CAPPED=problem.soft_cap is not None,
            SCALING=scaling,
            CODES=codes,
            WORDS=words,
            STEP=math.gcd(16, *keys.stride()[:-1], *values.stride()[:-1]),
            BLOCKS=problem.bidirectional or not step.causal,
            PREFIX_CAUSAL=step.prefix_causal and not problem.bidirectional,
            SPLITS=splits,
            BLOCK_T=block_tokens,
            BLOCK_G=members,
            BLOCK_N=tile.depth,
            BLOCK_D=max(16, next_power(problem.head_dim)),
            BLOCK_DV=max(16, next_power(dv)),
            UPCAST=interpreting(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if sums is not None:
            rows = tokens * heads
            join_splits.launch(
                (rows,),
                sums,
                most,
                total,
                y,
                rows,
                DV=dv,
                SPLITS=splits,
                BLOCK_DV=next_power(dv),
                num_warps=2,
            )
        return y

    def cases(self, device: Device) -> Iterator[Case]:
        """Yield decoding and prompts, over every type of cache.

        Some have what models add: a window, a cap, sinks, odd head sizes.
        """
        plain = example_problem(device, KVType(torch.bfloat16))
        problems = {
            "bfloat16 cache": plain,
            "float16 cache": replace(plain, dtype=torch.float16, kv=KVType(torch.float16)),
            "fp8 cache": replace(plain, kv=KVType(torch.float8_e4m3fn, "static")),
            "int8 cache": replace(plain, kv=KVType(torch.int8, "token")),
            "window, sinks": replace(plain, num_heads=64, head_dim=64, sliding_window=128, sinks=True),
            "cap, heads of 256": replace(
                plain, num_heads=16, head_dim=256, value_head_dim=256, soft_cap=50.0, sliding_window=4096
            ),
            "heads of 96": replace(plain, num_heads=8, head_dim=96, value_head_dim=96),
        }
        for name, problem in problems.items():
            for requests, new, length in ((1, 1, 8192), (64, 1, 1024), (2, 512, 2048)):
                title = f"{name}, {requests} x {new} tokens of {length}"
                run = partial(self._on_meta, problem, requests, new, length)
                yield Case(title, run, hot=new == 1)

    def _on_meta(self, problem: AttentionProblem, requests: int, new: int, length: int) -> None:
        step = AttentionStep(
            cu_seqlens_q=torch.empty(requests + 1, dtype=torch.int32, device="meta"),
            context_lens=torch.empty(requests, dtype=torch.int32, device="meta"),
            page_tables=torch.empty((requests, length // 16), dtype=torch.int32, device="meta"),
            max_seqlen_q=new,
            max_seqlen_k=length,
        )
        q, k, v, cache = meta_tensors(problem, requests * new, requests * length)
        sinks = torch.empty(problem.num_heads, dtype=problem.dtype, device="meta") if problem.sinks else None
        self.run(problem, q, k, v, step, cache, sinks)


class TritonAttention(TritonGroupedAttention):
    """Attention with one query head in a tile."""

    name = "triton"

    def group(self, problem: AttentionProblem) -> int:
        return 1

    def cases(self, device: Device) -> Iterator[Case]:
        return iter(list(super().cases(device))[:3])


def choose_tile(problem: AttentionProblem, step: AttentionStep, group: int) -> Tile:
    """Choose the tile of an attention step, as tuned or by rule.

    outputs: the heads of the group.  tokens: rows, each token's heads of the group included.  depth: keys.
    splits: parts of the keys, 1 unless the step is decoding.
    """
    decoding = step.max_seqlen_q <= 1
    size = bucket(step.max_seqlen_q)
    kind = f"d{problem.head_dim} g{group} {str(problem.kv.dtype).removeprefix('torch.')}"
    sizes = f"r{bucket(step.num_reqs)} k{bucket(step.max_seqlen_k)}" if decoding else f"t{size}"
    shape = f"{FAMILY} {sizes} {kind}"
    return tuned(problem.device, shape) or _default_tile(problem, step, group)


def _default_tile(problem: AttentionProblem, step: AttentionStep, group: int) -> Tile:
    architecture = architecture_of(problem.device)
    shared = architecture.shared_bytes
    widths = next_power(problem.head_dim) + next_power(problem.value_head_dim)
    wide = widths > 256
    members = next_power(group)
    if step.max_seqlen_q <= 1:
        # 64 keys spill on Blackwells: on the small ones where a head has a tile of its own.
        spills = architecture.name == "sm100" or (architecture.name == "sm120" and members == 1)
        narrow = 32 if spills else 64
        rows, depth, warps = max(16, members), 16 if wide else narrow, 8 if wide else 4
        blocks = step.num_reqs * (problem.num_heads // group)
        keys = min(bucket(step.max_seqlen_k), problem.sliding_window or bucket(step.max_seqlen_k))
        splits = 1
        while (
            blocks * splits < 2 * problem.device.processors
            and keys // (2 * splits) >= LEAST_KEYS
            and splits < 64
        ):
            splits *= 2
    else:
        # Larger tiles of padded or wide heads do not fit the registers, nor do 64 keys of codes that warps expand for
        # themselves (benchmarks/results/triton_aot.md).
        from_registers = multiplies_from_registers(architecture)
        small = wide or problem.head_dim != next_power(problem.head_dim) or not architecture.is_nvidia
        rows = max(members, min(next_power(step.max_seqlen_q) * members, 64 if small else 128), 16)
        codes = problem.kv.dtype is torch.int8 or (problem.kv.dtype in EIGHT_BIT and from_registers)
        depth, splits = 32 if small or codes else 64, 1
        # A warp has 16 rows whole: where warps divide columns, each expands all codes, and sums change their layout.
        warps = 8 if wide and from_registers and rows >= 64 else max(4, rows // 16)
    stages = max(1, min(3, (shared - 2 * rows * widths) // (2 * depth * widths)))
    return Tile(group, rows, depth, splits, warps, stages)


def _in_words(stored: Tensor, size: int) -> bool:
    """Tell whether 8-bit codes of a head can be read four at a time."""
    places = (size, *stored.stride()[:-1], stored.storage_offset())
    return (
        stored.dtype in EIGHT_BIT and stored.stride(-1) == 1 and size >= 64 and not any(n % 4 for n in places)
    )


def _codes_of(problem: AttentionProblem, dtype: torch.dtype, words: bool) -> str:
    """Name the codes as `word_values` and `stored_value` know them; "" for floats."""
    if dtype is torch.float8_e4m3fn:
        architecture = architecture_of(problem.device)
        if words and architecture.name == "gfx90a":
            return "normal"  # its matrix units take subnormal numbers for 0
        if not words or not architecture.fp8 or interpreting():
            return "fp8"
        return "ptx" if architecture.is_nvidia else "converted"
    return "int8" if dtype is torch.int8 else ""


def _on_device(step: AttentionStep, device: torch.device) -> tuple[Tensor | None, ...]:
    """Return what kernels read of a step, on their device.  Only what a strategy left on the host is copied.

    In order: where each request's queries start, lengths, pages, status, holes and the holes' ends.
    """
    hole = step.mask_prefix_hole
    tensors = (
        step.cu_seqlens_q,
        step.context_lens,
        step.page_tables,
        None if step.causal else step.status_table,
        step.prefix_lens if hole else None,
        step.padded_prefix_lens if hole else None,
    )
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


def example_problem(device: Device, kv: KVType) -> AttentionProblem:
    """Return attention as a model of 8 B has it, to compile and count."""
    return AttentionProblem(
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        value_head_dim=128,
        scale=0.1,
        dtype=torch.bfloat16,
        device=device,
        kv=kv,
    )


def meta_tensors(
    problem: AttentionProblem, tokens: int, slots: int
) -> tuple[Tensor, Tensor, Tensor, PagedKV]:
    """Make q, k and v of one step, and a cache, on meta."""
    heads, kv_heads, dims = (
        problem.num_heads,
        problem.num_kv_heads,
        (problem.head_dim, problem.value_head_dim),
    )
    q = torch.empty((tokens, heads, dims[0]), dtype=problem.dtype, device="meta")
    k, v = (torch.empty((tokens, kv_heads, dim), dtype=problem.dtype, device="meta") for dim in dims)
    page = problem.page_size
    pages = [
        torch.empty((slots // page, page, kv_heads, dim), dtype=problem.kv.dtype, device="meta")
        for dim in dims
    ]
    shape = {"none": None, "static": (kv_heads,), "token": (slots // page, page, kv_heads)}[
        problem.kv.scaling
    ]
    scales = [None if shape is None else torch.empty(shape, device="meta") for _ in dims]
    return q, k, v, PagedKV(problem.kv, pages[0], pages[1], scales[0], scales[1])
