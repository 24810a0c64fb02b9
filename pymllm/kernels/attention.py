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
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from pymllm.errors import ConfigError, IndicesError, counted
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
    checked: Any = field(default=None, repr=False)  # what a kernel found these tensors to be

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
    native: Any = field(
        default=None, init=False, repr=False
    )  # what a native kernel found these tensors to be
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

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each request: its first new token, the end of its new tokens, and its length after this step."""
        return self.checked("spans", self._spans, self.cu_seqlens_q, self.context_lens)

    def _spans(self) -> list[tuple[int, int, int]]:
        if self.cu_seqlens_q is None or self.context_lens is None:
            raise _wrong_step("a step has no requests", "cu_seqlens_q and context_lens", "None")
        starts = list(self.cu_seqlens_q.tolist() if self.query_starts is None else self.query_starts)
        lengths = list(self.context_lens.tolist() if self.lengths is None else self.lengths)
        if len(starts) != len(lengths) + 1 or starts[0] != 0:
            raise _wrong_step(
                "cu_seqlens_q must begin with 0 and have a number more than context_lens",
                f"0 and {len(lengths)} numbers more",
                f"{len(starts)} numbers, the first of them {starts[:1]}",
            )
        spans = list(zip(starts[:-1], starts[1:], lengths, strict=True))
        for request, (start, stop, length) in enumerate(spans):
            if not 0 <= stop - start <= length:
                raise _wrong_step(
                    f"request {request} must have from 0 to all of its tokens (context_lens) in a step",
                    f"0 to {length}",
                    f"{stop - start} (cu_seqlens_q)",
                )
        return spans

    def check_tokens(self, tokens: int) -> None:
        """Raise ConfigError unless the step's requests have so many new tokens together."""
        # Not `spans`: a step that runs again has none, but always as many tokens.
        spans = self.checked("spans", self._spans, self.cu_seqlens_q, self.context_lens)
        found = spans[-1][1] if spans else 0
        if found != tokens:
            raise _wrong_step(
                f"cu_seqlens_q must go from 0 to {tokens}, the number of new tokens", str(tokens), str(found)
            )

    @property
    def token_lengths(self) -> Tensor:
        """The length of each new token's request after this step, [T] int32."""
        starts, lengths = self.cu_seqlens_q, self.context_lens
        assert starts is not None and lengths is not None
        if self.max_seqlen_q == 1:
            return lengths
        return self.once("token lengths", lambda: lengths.repeat_interleave(starts.diff()), starts, lengths)

    def once(self, key: Hashable, make: Callable[[], Made], *sources: Tensor | None) -> Made:
        """Call `make` once a step, and share what it returns among all layers under `key`.

        sources: the tensors that it reads; where one was replaced or written to by torch since, it is called again.
        """
        return _kept(self._made, key, make, sources)

    def checked(self, key: Hashable, look: Callable[[], Made], *sources: Tensor | None) -> Made:
        """Call `look` as `once` does, but keep its result when the step starts again.

        For what does not depend on numbers that a step which runs again has anew (engine/decoding.py writes them past
        torch): those are looked at natively, at every call (kernels/checks.h).
        """
        return _kept(self._checked, key, look, sources)

    def restart(self) -> None:
        """Forget what `once` made."""
        self._made.clear()

    def stored_slots(self, tokens: int, count: int) -> Tensor:
        """Return slot_mapping.  Raises IndicesError unless it has a slot below `count` for each of the tokens."""

        def look() -> Tensor:
            slots = self.slot_mapping
            if slots is None or slots.shape != (tokens,):
                found = "None" if slots is None else str(list(slots.shape))
                raise _wrong_step(
                    "slot_mapping must have a slot for each new token", f"[{tokens}]", found, IndicesError
                )
            # Elsewhere a look would wait for the device.
            if slots.is_cpu and tokens and int(slots.max()) >= count:
                raise _wrong_step(
                    "slot_mapping names a slot that the cache does not have",
                    f"slots below {count}",
                    str(int(slots.max())),
                    IndicesError,
                )
            return slots

        return self.once(("stored slots", tokens, count), look, self.slot_mapping)

    def slots(self, request: int, first: int, num_pages: int) -> Tensor:
        """Find the positions from `first` of a request in the flattened pages, of which there are num_pages.

        Returns [length - first] int64.  Raises IndicesError where page_tables has other pages, or too few.
        """

        def make() -> Tensor:
            table, length = self.page_tables, self.spans[request][2]
            assert table is not None
            if table.ndim != 2 or request >= len(table) or length > table.shape[1] * self.page_size:
                raise _wrong_step(
                    f"page_tables has too few pages for request {request}",
                    f"pages of {counted(self.page_size, 'token')} for {length} tokens",
                    str(list(table.shape)),
                    IndicesError,
                )
            position = torch.arange(first, length, device=table.device)
            pages = table[request, position // self.page_size].long()
            # Elsewhere a look would wait for the device.
            if table.is_cpu and pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
                raise _wrong_step(
                    "page_tables names a page that the cache does not have",
                    f"pages from 0 to {num_pages - 1}",
                    f"{int(pages.min())} to {int(pages.max())}",
                    IndicesError,
                )
            return pages * self.page_size + position % self.page_size

        sources = (self.page_tables, self.cu_seqlens_q, self.context_lens)
        return self.once(("slots", request, first, num_pages), make, *sources)

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
            reading = table is None or self.once("states", table.tolist, table)[request] == 0
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

        sources = (self.cu_seqlens_q, self.context_lens, self.status_table)
        holes = (self.prefix_lens, self.padded_prefix_lens)
        return self.once(("visible", request, first, sliding_window, bidirectional), make, *sources, *holes)


def _kept(
    kept: dict[Hashable, tuple[tuple[Tensor | None, ...], list[int], Any]],
    key: Hashable,
    make: Callable[[], Made],
    sources: tuple[Tensor | None, ...],
) -> Made:
    """Return what `make` returned for this key, if it did with the same sources and what they held."""
    found = kept.get(key)
    if found is not None:
        before, versions, made = found
        for source, other in zip(sources, before, strict=True):
            if source is not other:
                break
        else:
            if not sources or versions == [_version(source) for source in sources]:
                return made  # type: ignore[no-any-return]
    versions = [_version(source) for source in sources]
    made = make()
    kept[key] = (sources, versions, made)
    return made


def _version(tensor: Tensor | None) -> int:
    """Count how often torch has written to a tensor; tensors of inference mode have no count."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _wrong_step(
    message: str, expected: str, found: str, error: type[ConfigError] = ConfigError
) -> ConfigError:
    fix = "Make the step anew for other requests, or keep its tensors as they are."
    return error(message, code="attention-step", expected=expected, found=found, fix=fix)


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
    if cache is None and length != stop - start:
        raise _wrong_step(
            "without a cache, context_lens must be the numbers of new tokens (cu_seqlens_q)",
            f"{stop - start} for request {request}",
            str(length),
        )
    if cache is None and not len(k) == len(v) >= stop:
        raise _wrong_step("a step has other tokens than k and v", str(stop), f"{len(k)} and {len(v)}")
    if cache is None or (length == stop - start and cache.type.keeps(k.dtype)):
        return k[start:stop], v[start:stop], 0
    first = 0
    if problem.sliding_window is not None:
        first = max(0, length - (stop - start) - problem.sliding_window + 1)
    keys, values = cache.read(step.slots(request, first, cache.k.shape[0]), k.dtype)
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
        """Store k, [T, Hkv, D], and v, [T, Hkv, Dv], in the slots of step.slot_mapping; below 0 nowhere.

        A kernel may have `rotate_and_store`, too, which does the work of `rotate` of the elementwise kernels before. It
        is called where those have `rotates_in_store`, and the attention kernel has `reads_pages` and so needs no k.
        """
