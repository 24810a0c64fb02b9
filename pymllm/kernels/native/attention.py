"""Attention over pages, and storing in pages, on the CPU in C++: `kernels/attention.h` says how.

The arithmetic is float32, whatever keys and values are stored as. A row's result depends neither on the requests beside
it nor on the number of threads.
"""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError, IndicesError
from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV
from pymllm.kernels.native.addresses import (
    CODE,
    Places,
    address,
    checked_address,
    floats,
    integers,
    lie_as,
    places_of,
    strided_rows,
    unfit,
)
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
        if q.ndim != 3:
            raise unfit("q", q, ("T", problem.num_heads, problem.head_dim), problem.dtype)
        tokens, heads, head_dim = q.shape
        dtype, kv_heads, value_dim = problem.dtype, problem.num_kv_heads, problem.value_head_dim
        if q.dtype is not dtype or not q.is_cpu or (heads, head_dim) != (problem.num_heads, problem.head_dim):
            raise unfit("q", q, ("T", problem.num_heads, problem.head_dim), dtype)
        q, query, q_stride = strided_rows("q", q)
        if cache is None:
            for name, new, size in (("k", k, head_dim), ("v", v, value_dim)):
                if new.dtype is not dtype or not new.is_cpu or new.shape != (tokens, kv_heads, size):
                    raise unfit(f"without a cache, {name}", new, (tokens, kv_heads, size), dtype)
            (k, keys, k_stride), (v, values, v_stride) = strided_rows("k", k), strided_rows("v", v)
            element, k_scales, v_scales, scale_stride = FLOAT_TYPES[dtype], 0, 0, 0
            page_count, page_size = -1, 1
        else:
            pages = _pages(cache, problem)
            keys, values, k_scales, v_scales, k_stride, v_stride, scale_stride, element = pages.arguments
            page_count, page_size = pages.count, pages.page_size
        tables = _tables(step)
        if sinks is not None:
            sinks = floats("sinks", sinks.detach())
        y = q.new_empty(tokens, heads, value_dim)  # a tuple would cost 0.3 us
        native().attention(
            query,
            y.data_ptr(),
            FLOAT_TYPES[dtype],
            q_stride,
            keys,
            k_scales,
            head_dim,
            k_stride,
            values,
            v_scales,
            value_dim,
            v_stride,
            element,
            scale_stride,
            *tables[:2],
            page_size,
            page_count,
            tokens,
            *tables[2:],
            0 if sinks is None else checked_address("sinks", sinks, (heads,), torch.float32),
            heads,
            kv_heads,
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
        heads, dtype = problem.num_kv_heads, problem.dtype
        if k.ndim != 3:
            raise unfit("k", k, ("T", heads, problem.head_dim), dtype)
        tokens = k.shape[0]
        pages = _pages(cache, problem)
        keys, values, k_scales, v_scales, k_stride, v_stride, _, element = pages.arguments
        slots = step_numbers(step, "slot_mapping", torch.int64)
        if slots.shape != (tokens,):
            raise unfit("slot_mapping", slots, (tokens,), torch.int64, IndicesError)
        where, slot_count = address("slot_mapping", slots, tokens * 8), pages.count * pages.page_size
        isa, threads = isa_code(self.isa or problem.device.isa), torch.get_num_threads()
        for name, new, size, to, scales, stride in (
            ("k", k, problem.head_dim, keys, k_scales, k_stride),
            ("v", v, problem.value_head_dim, values, v_scales, v_stride),
        ):
            if new.dtype is not dtype or not new.is_cpu or new.shape != (tokens, heads, size):
                raise unfit(f"the new {name}", new, (tokens, heads, size), dtype)
            new, at, between = strided_rows(name, new)
            native().store_kv(
                at,
                FLOAT_TYPES[dtype],
                between,
                to,
                element,
                size,
                stride,
                scales,
                where,
                slot_count,
                tokens,
                heads,
                isa,
                threads,
            )


MAX_CODED_HEAD = 256  # kStrip in kernels/strips.h
LONGEST = 2**31  # no request has so many tokens: lengths are int32


# What a layer's pages and a step's tensors are is looked at once, and kept with them. Each call then asks whether they
# are the same tensors, and lie where they lay. What numbers a step's tensors hold, the native code looks at itself, at
# every call (kernels/checks.h).


@dataclass(slots=True)
class _Pages:
    """The form of a cache's tensors, as they were found.

    tensors: keys, values, and the scales of both.  places: where each lies, and its form.
    sizes: of a slot: key heads, a head of keys, a head of values.  count: of pages.
    arguments: the addresses of keys, values and their scales, the elements between the slots of each, and their type.
    """

    tensors: tuple[Tensor | None, ...]
    places: Places
    sizes: tuple[int, int, int]
    count: int
    page_size: int
    arguments: tuple[int, ...]


def _pages(cache: PagedKV, problem: AttentionProblem) -> _Pages:
    """Return what a cache's tensors are.  Raises ConfigError where they are not those of the problem."""
    kept = cache.checked
    if kept is not None:
        k, v, k_scale, v_scale = kept.tensors
        if (
            cache.k is k
            and cache.v is v
            and cache.k_scale is k_scale
            and cache.v_scale is v_scale
            and kept.sizes == (problem.num_kv_heads, problem.head_dim, problem.value_head_dim)
            and lie_as(kept.places)
        ):
            return kept  # type: ignore[no-any-return]
    cache.checked = kept = _look_at_pages(cache, problem)
    return kept


def _look_at_pages(cache: PagedKV, problem: AttentionProblem) -> _Pages:
    kind, heads, sizes = cache.type, problem.num_kv_heads, (problem.head_dim, problem.value_head_dim)
    if cache.k.ndim != 4 or kind.dtype not in ELEMENTS:
        raise unfit("the cache's keys", cache.k, ("pages", problem.page_size, heads, sizes[0]), kind.dtype)
    count, page_size, *_ = cache.k.shape
    found = [
        checked_address(f"the cache's {name}", tensor, (count, page_size, heads, size), kind.dtype)
        for name, tensor, size in zip(("keys", "values"), (cache.k, cache.v), sizes, strict=True)
    ]
    shape = {"none": None, "static": (heads,), "token": (count, page_size, heads)}[kind.scaling]
    for name, scale in (("keys", cache.k_scale), ("values", cache.v_scale)):
        if scale is None and shape is None:
            found.append(0)
        elif scale is None or shape is None:
            raise unfit(f"the scales of the cache's {name}", scale, shape or ("none",), torch.float32)
        else:
            found.append(checked_address(f"the scales of the cache's {name}", scale, shape, torch.float32))
    strides = (heads * sizes[0], heads * sizes[1], heads if kind.scaling == "token" else 0)
    tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    for tensor in tensors:
        if tensor is not None and tensor.is_neg():
            raise unfit("the cache's pages and scales", tensor)
    arguments = (*found, *strides, ELEMENTS[kind.dtype])
    return _Pages(tensors, places_of(tensors), (heads, *sizes), count, page_size, arguments)


@dataclass(slots=True)
class _Tables:
    """The form of a step's tensors, as they were found.

    sources: those of the step, and what else the arguments follow from.  places: as of `_Pages`.
    arguments: the address of the page tables, and how many pages each has; those of the requests' starts and lengths,
    and their number; the size of a block; the addresses of their states, and of the beginnings and ends of their holes.
    """

    sources: tuple[Any, ...]
    places: Places
    arguments: tuple[int, ...]


def _tables(step: AttentionStep) -> tuple[int, ...]:
    """Return the arguments of `_Tables`."""
    kept = step.native
    if kept is not None:
        starts, lengths, pages, states, holes, ends, block, causal, hidden = kept.sources
        if (
            step.cu_seqlens_q is starts
            and step.context_lens is lengths
            and step.page_tables is pages
            and step.status_table is states
            and step.prefix_lens is holes
            and step.padded_prefix_lens is ends
            and step.block_size == block
            and step.prefix_causal is causal
            and step.mask_prefix_hole is hidden
            and lie_as(kept.places)
        ):
            return kept.arguments  # type: ignore[no-any-return]
    return _look_at_tables(step)


def _look_at_tables(step: AttentionStep) -> tuple[int, ...]:
    used: list[Tensor] = []

    def find(name: str, shape: Callable[[Tensor], tuple[int, ...]]) -> int:
        numbers = step_numbers(step, name)
        used.append(numbers)
        wanted = shape(numbers)
        if numbers.shape != wanted:
            raise unfit(name, numbers, wanted, torch.int32, IndicesError)
        return address(name, numbers, numbers.numel() * 4)

    lengths = find("context_lens", lambda numbers: (numbers.numel(),))
    count = used[0].numel()
    starts = find("cu_seqlens_q", lambda _: (count + 1,))
    pages, columns = 0, 0
    if step.page_tables is not None:
        # More rows than requests are none of theirs.
        pages = find(
            "page_tables", lambda t: (max(len(t), count), t.shape[1]) if t.ndim == 2 else (count, -1)
        )
        columns = used[-1].shape[1]
    if step.block_size < 1:
        raise ConfigError(f"block_size must be 1 or more, not {step.block_size}", code=CODE)
    # Without a table of states all requests count as in state 0.
    all_causal = step.prefix_causal and step.status_table is None
    block = 1 if all_causal else min(step.block_size, LONGEST)
    states = find("status_table", lambda _: (count,)) if step.prefix_causal and block > 1 else 0
    holes = find("prefix_lens", lambda _: (count,)) if step.mask_prefix_hole else 0
    ends = find("padded_prefix_lens", lambda _: (count,)) if step.mask_prefix_hole else 0
    arguments = (pages, columns, starts, lengths, count, block, states, holes, ends)
    sources = (
        step.cu_seqlens_q,
        step.context_lens,
        step.page_tables,
        step.status_table,
        step.prefix_lens,
        step.padded_prefix_lens,
        step.block_size,
        step.prefix_causal,
        step.mask_prefix_hole,
    )
    # What had to be converted holds numbers of its own, and is looked for anew at every call.
    if all(any(numbers is source for source in sources) for numbers in used):
        step.native = _Tables(sources, places_of(used), arguments)
    return arguments


def step_numbers(step: AttentionStep, name: str, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return one of the step's tensors as contiguous integers on the CPU; what has to be converted is kept."""
    tensor = getattr(step, name)
    whole = tensor is not None and tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()
    if whole and not tensor.is_neg():
        return tensor  # type: ignore[no-any-return]
    if not isinstance(tensor, Tensor):
        raise unfit(name, tensor, ("*",), dtype)
    return step.checked(("native", name), lambda: integers(name, tensor, dtype), tensor)
