"""Steps of random requests over shuffled pages, and attention in float64: what attention kernels are tested with."""

# T tokens, H query heads, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from pymllm.attention import AttnMetaDataBase
from pymllm.kernels.attention import AttentionProblem, KVType, PagedKV
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import select

KV_TYPES = {
    "float32": KVType(torch.float32),
    "bfloat16": KVType(torch.bfloat16),
    "fp8": KVType(torch.float8_e4m3fn, "static"),
    "int8": KVType(torch.int8, "token"),
}
REQUESTS_IN_BLOCKS = [(0, 8), (8, 4), (6, 7), (12, 8)]


def make_problem(**changes) -> AttentionProblem:
    """Four query heads over two key heads of 32, in float32; changed as asked."""
    settings = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "scale": 0.2,
        "dtype": torch.float32,
        "device": probe_device("cpu"),
    } | changes
    settings.setdefault("value_head_dim", settings["head_dim"])
    settings.setdefault("kv", KVType(settings["dtype"]))
    return AttentionProblem(**settings)


@dataclass
class Case:
    """Everything that a kernel is given.  requests: the (cached, new) tokens of each."""

    problem: AttentionProblem
    requests: list[tuple[int, int]]
    step: AttnMetaDataBase
    q: Tensor
    k: Tensor
    v: Tensor
    cache: PagedKV
    sinks: Tensor | None

    def expected(self) -> Tensor:
        """softmax(q kᵀ) v over what the pages hold, in float64.  Returns [T, H, Dv]."""
        outputs, start = [], 0
        for row, (cached, new) in enumerate(self.requests):
            keys, values = self.stored(row)
            outputs.append(self._attend(self.q[start : start + new].double(), keys, values, cached, row))
            start += new
        return torch.cat(outputs)

    def stored(self, row: int) -> tuple[Tensor, Tensor]:
        """What the pages hold of a request, [length, Hkv, D] float64."""
        size, table = self.problem.page_size, self.step.page_tables[row].tolist()
        found = []
        for pages, scales in ((self.cache.k, self.cache.k_scale), (self.cache.v, self.cache.v_scale)):
            rows = []
            for position in range(sum(self.requests[row])):
                page, offset = table[position // size], position % size
                scale = 1.0
                if scales is not None:
                    scale = (scales[page, offset] if scales.ndim == 3 else scales).double()[:, None]
                rows.append(pages[page, offset].double() * scale)
            found.append(torch.stack(rows))
        return found[0], found[1]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, cached: int, row: int) -> Tensor:
        problem, repeats = self.problem, self.problem.num_heads // self.problem.num_kv_heads
        result = torch.zeros(len(q), problem.num_heads, problem.value_head_dim, dtype=torch.float64)
        for index, position in enumerate(range(cached, cached + len(q))):
            seen = [p for p in range(len(keys)) if self._sees(row, cached, position, p)]
            for head in range(problem.num_heads):
                logits = (keys[seen, head // repeats] @ q[index, head]) * problem.scale
                if problem.soft_cap is not None:
                    logits = torch.tanh(logits / problem.soft_cap) * problem.soft_cap
                total = logits.exp().sum()
                if self.sinks is not None:
                    total += math.exp(float(self.sinks[head]))
                result[index, head] = (logits.exp() / total) @ values[seen, head // repeats]
        return result

    def _sees(self, row: int, cached: int, query: int, key: int) -> bool:
        step, window = self.step, self.problem.sliding_window
        if self.problem.bidirectional:
            return window is None or abs(key - query) < window
        if window is not None and key <= query - window:
            return False
        if step.mask_prefix_hole and step.prefix_lens[row] <= key < min(step.padded_prefix_lens[row], cached):
            return False
        reading = step.status_table is None or int(step.status_table[row]) == 0
        if step.block_size == 1 or (step.prefix_causal and reading):
            return key <= query
        return key // step.block_size <= query // step.block_size


def blocks_of_four(*, prefix_causal: bool, hole: bool) -> dict[str, object]:
    """Return the settings of a step over REQUESTS_IN_BLOCKS, of which 0 and 2 read their prompts.

    hole: cached positions of a padded prefix are not seen.
    """
    return {
        "block_size": 4,
        "status_table": torch.tensor([0, 1, 0, 2], dtype=torch.int32),
        "prefix_causal": prefix_causal,
        "mask_prefix_hole": hole,
        "prefix_lens": torch.tensor([3, 5, 2, 6], dtype=torch.int32),
        "padded_prefix_lens": torch.tensor([8, 8, 4, 12], dtype=torch.int32),
    }


def make_case(
    problem: AttentionProblem, requests: list[tuple[int, int]], *, seed: int = 0, **step_settings
) -> Case:
    """Random requests whose keys and values, cached and new, are in shuffled pages; unused pages hold garbage."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(problem.dtype)

    size = problem.page_size
    needed = [-(-(cached + new) // size) for cached, new in requests]
    total = sum(needed) + 3
    order = torch.randperm(total, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    most = max(needed)
    page_tables = torch.tensor([table + [0] * (most - len(table)) for table in tables], dtype=torch.int32)
    cache = empty_pages(problem, total)
    heads, kv_heads = problem.num_heads, problem.num_kv_heads
    store = select("kv_store", problem).kernel
    new_k, new_v = [], []
    for table, (cached, new) in zip(tables, requests, strict=True):
        k = random(cached + new, kv_heads, problem.head_dim)
        v = random(cached + new, kv_heads, problem.value_head_dim)
        slots = torch.tensor([table[p // size] * size + p % size for p in range(cached + new)])
        store.run(problem, k, v, cache, AttnMetaDataBase(slot_mapping=slots))
        new_k.append(k[cached:])
        new_v.append(v[cached:])
    counts = [new for _, new in requests]
    lengths = [cached + new for cached, new in requests]
    step = AttnMetaDataBase(
        cu_seqlens_q=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        max_seqlen_q=max(counts),
        max_seqlen_k=max(lengths),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        page_tables=page_tables,
        page_size=size,
        **step_settings,
    )
    return Case(
        problem,
        requests,
        step,
        random(sum(counts), heads, problem.head_dim),
        torch.cat(new_k),
        torch.cat(new_v),
        cache,
        random(heads).float() if problem.sinks else None,
    )


def empty_pages(problem: AttentionProblem, pages: int) -> PagedKV:
    """Pages full of garbage: large where the type has room for it."""
    kind, slots = problem.kv, (pages, problem.page_size, problem.num_kv_heads)

    def garbage(size: int) -> Tensor:
        return torch.full((*slots, size), 100.0).to(kind.dtype)

    scales: list[Tensor | None] = [None, None]
    if kind.scaling == "static":
        scales = [torch.linspace(0.01, 0.02, problem.num_kv_heads) * (i + 1) for i in range(2)]
    elif kind.scaling == "token":
        scales = [torch.full(slots, 1e3) for _ in range(2)]
    return PagedKV(kind, garbage(problem.head_dim), garbage(problem.value_head_dim), *scales)
