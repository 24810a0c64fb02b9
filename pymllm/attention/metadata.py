"""What attention layers must know of a step, and the hook through which they fetch it.

A runner installs a fetch function once and makes the current step's metadata available through it; a decoding strategy
adds its own subclass of `AttnMetaDataBase` beside itself.
"""

# R requests, T tokens of this step

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pymllm.errors import ConfigError


@dataclass
class AttnMetaDataBase:
    """One step's requests, side by side.

    is_prefill: whether any request brings more than one new token.
    cu_seqlens_q: [R + 1] int32, where each request's new tokens start; cu_seqlens_k: the same for all its tokens.
    slot_mapping: [T] int64, where each new token's key and value go in the cache; below 0: nowhere.
    context_lens: [R] int32, tokens of each request after this step.
    page_tables: [R, pages] int32, the cache pages of each request; None: there is no cache.
    status_table: a strategy's own state for each request.
    """

    is_prefill: bool = False
    enforce_eager: bool = True
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    slot_mapping: Tensor | None = None
    context_lens: Tensor | None = None
    page_tables: Tensor | None = None
    status_table: Tensor | None = None
    page_size: int = 16
    block_size: int = 1
    kv_cache_layout: str = "unified"
    prefix_causal: bool = True
    mask_prefix_hole: bool = False

    @property
    def num_reqs(self) -> int:
        return 0 if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    @property
    def has_prefill(self) -> bool:
        return self.is_prefill

    @property
    def all_prefill(self) -> bool:
        """Whether no request has anything in the cache yet."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return self.is_prefill
        return bool((self.cu_seqlens_q == self.cu_seqlens_k).all())

    @property
    def need_kv_cache_store(self) -> bool:
        return self.slot_mapping is not None and self.slot_mapping.numel() > 0


_fetch: Callable[[], AttnMetaDataBase] | None = None
_warming_up = False


def set_fetch_fn_for_attn_metadata(fn: Callable[[], AttnMetaDataBase] | None) -> None:
    """Install how attention layers get the current step's metadata."""
    global _fetch
    _fetch = fn


def fetch_attn_metadata() -> AttnMetaDataBase:
    """The current step's metadata.  ConfigError if no runner has installed a fetch function."""
    if _fetch is None:
        raise ConfigError(
            "attention has no metadata to read",
            code="no-attention-metadata",
            fix="The runner must call set_fetch_fn_for_attn_metadata(fn) before the model's forward.",
        )
    return _fetch()


def set_warming_up(value: bool = True) -> None:
    """Say that the runs to come only warm up (a graph capture, say)."""
    global _warming_up
    _warming_up = value


def is_warming_up() -> bool:
    return _warming_up


def reset_warming_up() -> None:
    set_warming_up(False)
