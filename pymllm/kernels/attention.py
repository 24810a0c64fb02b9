"""The contract of attention kernels: a layer's problem, its pages, and one step of requests.

A kernel gets the whole step at once: the queries of all requests side by side, their new keys and values, the layer's
pages, and an `AttentionStep` that says which token is whose. New keys and values are stored before the kernel runs
(operation "kv_store"), so the pages hold every token that a query may see. A query sees keys and values as the pages
return them: with a quantised cache that goes for its own step's too, so that a prompt has the same results however it
is cut into steps. A kernel may read `k` and `v` instead where there is no cache, or one that `keeps` their dtype.
"""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device

PAGE_SIZE = 16

Scaling = Literal["none", "static", "token"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class KVType:
    """The form in which a cache stores keys and values.

    dtype: that of a stored element.  scaling: "none", as they are; "static", divided by a scale of each head that is
    fixed before any token comes; "token", divided by a scale of each token's head, stored beside it.
    """

    dtype: torch.dtype
    scaling: Scaling = "none"

    def keeps(self, dtype: torch.dtype) -> bool:
        """Tell whether values of this dtype come back as they were given."""
        return self.scaling == "none" and self.dtype is dtype

    def bytes_per_token(self, num_kv_heads: int, head_dim: int, value_head_dim: int) -> int:
        """Count the bytes of one token in one layer, keys and values together."""
        scales = 2 * torch.float32.itemsize if self.scaling == "token" else 0
        return num_kv_heads * ((head_dim + value_head_dim) * self.dtype.itemsize + scales)

    def __str__(self) -> str:
        scales = {"none": "", "static": " with a scale a head", "token": " with a scale a token's head"}
        return str(self.dtype).removeprefix("torch.") + scales[self.scaling]


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """One rank's attention layer, as a kernel sees it.

    scale: the factor of the products of queries and keys.  value_head_dim: differs from head_dim for MLA.
    sliding_window: a query sees so many positions, its own included; None: all.
    bidirectional: a query sees what comes after it, too: to the end, or as far as sliding_window reaches back.
    soft_cap: scaled products p become soft_cap * tanh(p / soft_cap).  sinks: each head has one more logit, which
    takes part in the softmax and brings no value.  kv: the form in which the cache stores keys and values.
    block_causal: a query sees its whole block (`AttentionStep.block_size`), not just what lies before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    scale: float
    dtype: torch.dtype
    device: Device
    kv: KVType
    page_size: int = PAGE_SIZE
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    block_causal: bool = False
    bidirectional: bool = False


@dataclass(eq=False)
class PagedKV:
    """One layer's pages.

    k: [pages, P, Hkv, D], v: [pages, P, Hkv, Dv], contiguous, in the type's dtype.
    k_scale, v_scale: float32, [Hkv] with static scaling, [pages, P, Hkv] with a scale a token, else None.
    A value is its stored element times its scale.
    """

    type: KVType
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_scale, self.v_scale) if t is not None)

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read the keys and values of slots, and convert them to `dtype`.

        slots: [N], indices of the flattened pages.  Returns [N, Hkv, D] and [N, Hkv, Dv].
        """
        if self.type.scaling == "none":
            return self.k.flatten(0, 1)[slots].to(dtype), self.v.flatten(0, 1)[slots].to(dtype)
        values = []
        for stored, scale in ((self.k, self.k_scale), (self.v, self.v_scale)):
            assert scale is not None
            scale = scale.flatten(0, 1)[slots] if self.type.scaling == "token" else scale
            # Not every device can gather fp8, but every one can gather bytes.
            codes = stored.flatten(0, 1).view(torch.uint8)[slots].view(stored.dtype)
            values.append((codes.float() * scale.unsqueeze(-1)).to(dtype))
        return values[0], values[1]


@dataclass(eq=False)
class AttentionStep:
    """One step's requests, side by side, as kernels read them.

    cu_seqlens_q: [R + 1] int32, where each request's new tokens start; cu_seqlens_k: the same for all its tokens.
    slot_mapping: [T] int64, where each new token's key and value go in the flattened pages; below 0: nowhere.
    context_lens: [R] int32, how many tokens each request has after this step, its new ones included.
    page_tables: [R, pages] int32, the pages of each request in order; None: there is no cache.
    query_starts, lengths: cu_seqlens_q and context_lens on the host; None: read from the device when first needed.
    state_slots: [R] int64, where each request's state lies in the layers that keep one (`WeightHolder.state_bytes`);
    below 0: nowhere; None: there are no such layers, or nothing is kept after this step.

    A query sees the positions up to its own, unless a strategy decodes blocks:
    block_size: above 1, a query sees all new positions up to its own block's end.  status_table: [R] int32, a
    strategy's state of each request, 0 while its prompt is read.  prefix_causal: requests in state 0 are causal.
    mask_prefix_hole: cached positions from prefix_lens up to padded_prefix_lens, [R] int32, are not seen.
    """

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: Tensor | None = None
    context_lens: Tensor | None = None
    page_tables: Tensor | None = None
    page_size: int = PAGE_SIZE
    query_starts: Sequence[int] | None = None
    lengths: Sequence[int] | None = None
    state_slots: Tensor | None = None
    status_table: Tensor | None = None
    block_size: int = 1
    prefix_causal: bool = True
    mask_prefix_hole: bool = False
    prefix_lens: Tensor | None = None
    padded_prefix_lens: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _checked: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def num_reqs(self) -> int:
        return 0 if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def need_kv_cache_store(self) -> bool:
        """True where any new key or value may have a slot."""
        return self.slot_mapping is not None and self.slot_mapping.numel() > 0

    @property
    def causal(self) -> bool:
        """True where every query sees the positions up to its own, and all of them."""
        return self.block_size == 1 and not self.mask_prefix_hole

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each request: its first new token, the end of its new tokens, and its length after this step."""
        assert self.cu_seqlens_q is not None and self.context_lens is not None
        starts = self.cu_seqlens_q.tolist() if self.query_starts is None else self.query_starts
        lengths = self.context_lens.tolist() if self.lengths is None else self.lengths
        return list(zip(starts[:-1], starts[1:], lengths, strict=True))

    @property
    def token_lengths(self) -> Tensor:
        """The length of each new token's request after this step, [T] int32."""
        starts, lengths = self.cu_seqlens_q, self.context_lens
        assert starts is not None and lengths is not None
        if self.max_seqlen_q == 1:
            return lengths
        return self.once("token lengths", lambda: lengths.repeat_interleave(starts.diff()))

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Call `make` once a step, and share what it returns among all layers under `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def checked(self, key: Hashable, look: Callable[[], Made]) -> Made:
        """Call `look` once, as `once` does, but keep its result when the step starts again.

        For a result that keeps the addresses of the step's own tensors, and none of their numbers: a step that runs
        again with other numbers in the same tensors (engine/tape.py) does not look again.
        """
        if key not in self._checked:
            self._checked[key] = look()
        return self._checked[key]

    def restart(self) -> None:
        """Forget what `once` made."""
        self._made.clear()

    def slots(self, request: int, first: int) -> Tensor:
        """Find the positions from `first` of a request in the flattened pages.  Returns [length - first] int64."""

        def make() -> Tensor:
            assert self.page_tables is not None
            position = torch.arange(first, self.spans[request][2], device=self.page_tables.device)
            pages = self.page_tables[request, position // self.page_size].long()
            return pages * self.page_size + position % self.page_size

        return self.once(("slots", request, first), make)

    def visible(
        self, request: int, first: int, sliding_window: int | None, bidirectional: bool = False
    ) -> Tensor:
        """Mark the positions from `first` that each new token of a request sees.

        bidirectional: as of the layer's `AttentionProblem`.
        Returns [new tokens, length - first] bool.
        """

        def make() -> Tensor:
            start, stop, length = self.spans[request]
            assert self.cu_seqlens_q is not None
            device = self.cu_seqlens_q.device
            cached = length - (stop - start)
            query = torch.arange(cached, length, device=device)[:, None]
            key = torch.arange(first, length, device=device)[None, :]
            table = self.status_table
            reading = table is None or self.once("states", table.tolist)[request] == 0
            if bidirectional:
                seen = key < (length if sliding_window is None else query + sliding_window)
            elif self.block_size == 1 or (self.prefix_causal and reading):
                seen = key <= query
            else:
                seen = key < (query // self.block_size + 1) * self.block_size
            if sliding_window is not None:
                seen = seen & (key > query - sliding_window)
            if self.mask_prefix_hole:
                assert self.prefix_lens is not None and self.padded_prefix_lens is not None
                hole = (key >= self.prefix_lens[request]) & (key < self.padded_prefix_lens[request])
                seen = seen & ~(hole & (key < cached))
            return seen

        return self.once(("visible", request, first, sliding_window, bidirectional), make)


def seen_kv(
    problem: AttentionProblem,
    k: Tensor,
    v: Tensor,
    step: AttentionStep,
    cache: PagedKV | None,
    request: int,
) -> tuple[Tensor, Tensor, int]:
    """Return the keys and values that a request's new tokens may see, and the first position among them.

    For kernels that take one request at a time. Keys and values come from `k` and `v`, [T, Hkv, D] and [T, Hkv, Dv],
    where these are all there are, else from the pages.  Returns [N, Hkv, D], [N, Hkv, Dv] and the position.
    """
    start, stop, length = step.spans[request]
    if cache is None or (length == stop - start and cache.type.keeps(k.dtype)):
        return k[start:stop], v[start:stop], 0
    first = 0
    if problem.sliding_window is not None:
        first = max(0, length - (stop - start) - problem.sliding_window + 1)
    keys, values = cache.read(step.slots(request, first), k.dtype)
    return keys, values, first


class AttentionKernel(Protocol):
    """A kernel for the attention of one step over keys and values that are stored already."""

    name: str

    def why_not(self, problem: AttentionProblem) -> str | None: ...

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
        """Attend: q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, H, Dv].

        q, k, v are in the problem's dtype; heads may be strided; T is above 0.
        cache: None: nothing is cached, and every request's tokens are all new.  sinks: [H] where the problem has them.
        """


class KVStoreKernel(Protocol):
    """A kernel that stores new keys and values in a layer's pages, in the pages' type."""

    name: str

    def why_not(self, problem: AttentionProblem) -> str | None: ...

    def run(
        self, problem: AttentionProblem, k: Tensor, v: Tensor, cache: PagedKV, step: AttentionStep
    ) -> None:
        """Store k, [T, Hkv, D], and v, [T, Hkv, Dv], in the slots of step.slot_mapping; below 0 nowhere."""
