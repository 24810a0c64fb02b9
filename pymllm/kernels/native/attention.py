"""Attention over pages, and storing in pages, on the CPU in C++: `kernels/attention.h` says how.

The arithmetic is float32, whatever keys and values are stored as. A row's result depends neither on the requests beside
it nor on the number of threads.
"""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV
from pymllm.kernels.native.extension import isa_code, native, native_missing_reason
from pymllm.kernels.native.float_linear import FLOAT_TYPES, why_not_here

# KVElement in kernels/attention.h
ELEMENTS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.float8_e4m3fn: 4,
}


class NativeAttention:
    """Attention in one pass over what a step sees.  isa: a kernel path, for tests; None: the one in use here."""

    name = "native"
    device_type = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: AttentionProblem) -> str | None:
        here = why_not_here(problem)
        if here is not None:
            return here
        if problem.kv.dtype not in ELEMENTS:
            return f"reads no cache of {problem.kv}"
        return native_missing_reason()

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
        # Every line counts: benchmarks/cpu_dispatch.py.
        tokens, heads, head_dim = q.shape
        value_dim = problem.value_head_dim
        wanted = (problem.num_heads, problem.head_dim)
        if q.dtype is not problem.dtype or not q.is_cpu or (heads, head_dim) != wanted:
            raise ValueError(
                f"q must be [T, {wanted[0]}, {wanted[1]}] {problem.dtype} on the CPU, "
                f"not {list(q.shape)} {q.dtype} on {q.device}"
            )
        q = _heads_adjoining(q)
        if cache is None:
            if k.dtype is not problem.dtype or v.dtype is not problem.dtype:
                raise ValueError(f"k and v must be {problem.dtype}, not {k.dtype} and {v.dtype}")
            for new, size in ((k, head_dim), (v, value_dim)):
                if new.shape != (tokens, problem.num_kv_heads, size) or not new.is_cpu:
                    raise ValueError(
                        f"without a cache, k and v must be [{tokens}, {problem.num_kv_heads}, {head_dim} and "
                        f"{value_dim}] on the CPU, not {list(k.shape)} and {list(v.shape)} on {new.device}"
                    )
            keys, values = _heads_adjoining(k), _heads_adjoining(v)
            k_stride, v_stride = keys.stride(0), values.stride(0)
            k_scales, v_scales, scale_stride = 0, 0, 0
            pages = step.checked("native lengths without pages", lambda: _no_pages(step))
        else:
            keys, values = cache.k, cache.v
            k_stride, v_stride = problem.num_kv_heads * head_dim, problem.num_kv_heads * value_dim
            k_scales, v_scales, scale_stride = _scales(cache)
            pages = step.checked(("native pages", cache.k.shape[:2]), lambda: _pages(step, cache))
        requests = step.checked("native requests", lambda: _requests(step, tokens))
        if sinks is not None:
            sinks = sinks.detach().to(torch.float32).contiguous()
            if sinks.shape != (heads,):
                raise ValueError(f"sinks must be [{heads}], not {list(sinks.shape)}")
        y = q.new_empty((tokens, heads, value_dim))
        native().attention(
            q.data_ptr(),
            y.data_ptr(),
            FLOAT_TYPES[q.dtype],
            q.stride(0),
            keys.data_ptr(),
            k_scales,
            head_dim,
            k_stride,
            values.data_ptr(),
            v_scales,
            value_dim,
            v_stride,
            ELEMENTS[keys.dtype],
            scale_stride,
            *pages[:3],
            *requests[:7],
            0 if sinks is None else sinks.data_ptr(),
            heads,
            problem.num_kv_heads,
            problem.scale,
            problem.soft_cap or 0.0,
            problem.sliding_window or 0,
            problem.bidirectional,
            isa_code(self.isa or problem.device.isa),
            torch.get_num_threads(),
        )
        return y


class NativeKVStore:
    """Storing in pages: a copy, rounding to floats, or scaling and rounding to int8.  isa: as for `NativeAttention`."""

    name = "native"
    device_type = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def why_not(self, problem: AttentionProblem) -> str | None:
        here = why_not_here(problem)
        if here is not None:
            return here
        kind = problem.kv
        floats = kind.scaling == "none" and kind.dtype in FLOAT_TYPES
        codes = kind.scaling == "token" and kind.dtype is torch.int8
        if not floats and not codes:
            return f"stores floats, and int8 with a scale a token's head, not {kind}"
        largest = max(problem.head_dim, problem.value_head_dim)
        if codes and largest > MAX_CODED_HEAD:
            return f"stores int8 heads of up to {MAX_CODED_HEAD} elements, the layer has {largest}"
        return native_missing_reason()

    def run(
        self, problem: AttentionProblem, k: Tensor, v: Tensor, cache: PagedKV, step: AttentionStep
    ) -> None:
        slots = step.checked(("native slots", cache.k.shape[:2]), lambda: _slots(step, cache, k.shape[0]))
        heads, threads = problem.num_kv_heads, torch.get_num_threads()
        isa = isa_code(self.isa or problem.device.isa)
        for new, pages, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
            new = _heads_adjoining(new)
            tokens, given, size = new.shape
            if new.dtype is not problem.dtype or not new.is_cpu or (given, size) != pages.shape[2:]:
                raise ValueError(
                    f"new keys and values must be [T, {heads}, {pages.shape[3]}] {problem.dtype} on the CPU, "
                    f"not {list(new.shape)} {new.dtype} on {new.device}"
                )
            native().store_kv(
                new.data_ptr(),
                FLOAT_TYPES[new.dtype],
                new.stride(0),
                pages.data_ptr(),
                ELEMENTS[pages.dtype],
                size,
                heads * size,
                0 if scales is None else scales.data_ptr(),
                slots.data_ptr(),
                tokens,
                heads,
                isa,
                threads,
            )


MAX_CODED_HEAD = 256  # kStrip in kernels/strips.h
LONGEST = 2**31  # no request has so many tokens: lengths are int32


def _heads_adjoining(x: Tensor) -> Tensor:
    """Bring the heads of each token of x, [T, heads, D], side by side; tokens may be further apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _scales(cache: PagedKV) -> tuple[int, int, int]:
    """Return the addresses of the scales of keys and of values, and the step between tokens; 0 where there are none."""
    if cache.k_scale is None or cache.v_scale is None:
        return 0, 0, 0
    return (
        cache.k_scale.data_ptr(),
        cache.v_scale.data_ptr(),
        cache.k.shape[2] if cache.type.scaling == "token" else 0,
    )


# The native code reads what it finds at addresses, without looking: so a step's tensors are checked first, once a step.
# Each result holds the addresses, and the tensors that keep them alive.


def _no_pages(step: AttentionStep) -> tuple[int, int, int, Tensor | None]:
    assert step.cu_seqlens_q is not None and step.context_lens is not None
    counts, lengths = step.cu_seqlens_q.diff(), step.context_lens
    if counts.shape != lengths.shape or bool((counts != lengths).any()):
        raise ValueError(
            "without a cache, context_lens must be the numbers of new tokens (cu_seqlens_q): "
            f"{counts.tolist()}, not {lengths.tolist()}"
        )
    return 0, 0, 1, None


def _pages(step: AttentionStep, cache: PagedKV) -> tuple[int, int, int, Tensor | None]:
    assert step.page_tables is not None and step.context_lens is not None
    table = step.page_tables.to("cpu", torch.int32).contiguous()
    pages, size = cache.k.shape[:2]
    lengths = step.context_lens
    if table.ndim != 2 or len(table) < lengths.numel():
        raise ValueError(f"page_tables must be [{lengths.numel()}, pages], not {list(table.shape)}")
    if table.numel() and (int(table.min()) < 0 or int(table.max()) >= pages):
        raise ValueError(
            f"page_tables must name pages from 0 to {pages - 1}, not {int(table.min())} to {int(table.max())}"
        )
    if lengths.numel() and int(lengths.max()) > table.shape[1] * size:
        raise ValueError(
            f"a request of {int(lengths.max())} tokens has only {table.shape[1]} pages of {size} tokens in page_tables"
        )
    return table.data_ptr(), table.shape[1], size, table


def _requests(step: AttentionStep, tokens: int) -> tuple[Any, ...]:
    assert step.cu_seqlens_q is not None and step.context_lens is not None
    starts = step.cu_seqlens_q.to("cpu", torch.int32).contiguous()
    lengths = step.context_lens.to("cpu", torch.int32).contiguous()
    counts = starts[1:] - starts[:-1]
    if starts.numel() != lengths.numel() + 1 or int(starts[0]) != 0 or int(starts[-1]) != tokens:
        raise ValueError(f"cu_seqlens_q must be [R + 1] from 0 to {tokens}, for {lengths.numel()} requests")
    if bool((counts < 0).any()) or bool((lengths < counts).any()):
        raise ValueError("a request has more new tokens (cu_seqlens_q) than tokens in all (context_lens)")
    if step.block_size < 1:
        raise ValueError(f"block_size must be 1 or more, not {step.block_size}")
    # Without a table of states all requests count as in state 0.
    all_causal = step.prefix_causal and step.status_table is None
    block = 1 if all_causal else min(step.block_size, LONGEST)
    states = _table(step, "status_table", lengths) if step.prefix_causal and block > 1 else None
    holes = _table(step, "prefix_lens", lengths) if step.mask_prefix_hole else None
    ends = _table(step, "padded_prefix_lens", lengths) if step.mask_prefix_hole else None
    tables = (states, holes, ends)
    found = (0 if table is None else table.data_ptr() for table in tables)
    return starts.data_ptr(), lengths.data_ptr(), lengths.numel(), block, *found, (starts, lengths, *tables)


def _table(step: AttentionStep, name: str, lengths: Tensor) -> Tensor:
    table = getattr(step, name)
    if table is None or table.shape != lengths.shape:
        found = "None" if table is None else str(list(table.shape))
        raise ValueError(f"{name} must be [{lengths.numel()}], a number for each request, not {found}")
    return table.to("cpu", torch.int32).contiguous()


def _slots(step: AttentionStep, cache: PagedKV, tokens: int) -> Tensor:
    assert step.slot_mapping is not None
    slots = step.slot_mapping.to("cpu", torch.int64).contiguous()
    total = cache.k.shape[0] * cache.k.shape[1]
    if slots.shape != (tokens,) or (tokens and int(slots.max()) >= total):
        raise ValueError(f"slot_mapping must be [{tokens}] with slots below {total}, not {list(slots.shape)}")
    return slots
