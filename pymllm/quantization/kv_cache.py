"""The KV cache's methods: how an attention layer's keys and values are stored.

An `Attention` layer holds one as its `quant_method`, as linear layers do theirs.
"""

# N slots, T tokens, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.kernels.attention import AttentionStep, KVType, PagedKV
from pymllm.kernels.registry import select
from pymllm.quantization.base import QuantizeMethodBase


class KVCacheMethodBase(QuantizeMethodBase):
    """One layer's cache in one storage type.  Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @abstractmethod
    def kv_type(self, dtype: torch.dtype) -> KVType:
        """How keys and values of this dtype are stored."""

    def create_weights(self, layer: nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        """Most methods have no scales to load."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing to pack, then."""

    def allocate(self, layer: Any, num_pages: int, page_size: int, device: torch.device) -> PagedKV:
        """Empty pages for the layer."""
        kind: KVType = layer.problem.kv
        slots = (num_pages, page_size, layer.num_kv_heads)
        return PagedKV(
            kind,
            torch.zeros((*slots, layer.head_dim), dtype=kind.dtype, device=device),
            torch.zeros((*slots, layer.value_head_dim), dtype=kind.dtype, device=device),
        )

    def store(self, layer: Any, k: Tensor, v: Tensor, step: AttentionStep) -> None:
        """Write new keys and values to their slots; a slot below 0 is skipped.  k: [T, Hkv, D], v: [T, Hkv, Dv]."""
        layer.store_selection.kernel.run(layer.problem, k, v, layer.cache, step)

    def load(self, layer: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        """What slots of the flattened pages hold, in the activations' dtype.  Returns [N, Hkv, D] and [N, Hkv, Dv]."""
        return layer.cache.read(slots, layer.problem.dtype)

    def apply(  # type: ignore[override]
        self, layer: Any, q: Tensor, k: Tensor, v: Tensor, step: AttentionStep, sinks: Tensor | None = None
    ) -> Tensor:
        """Store the step's keys and values, then attend.  Shapes as of `AttentionKernel.run`.  Returns [T, H, Dv]."""
        problem, kernel = layer.problem, layer.selection.kernel
        cache = None if step.page_tables is None else layer.cache
        if cache is not None and step.need_kv_cache_store:
            self.store(layer, k, v, step)
        elif cache is None and not problem.kv.keeps(k.dtype):
            k, v = self.as_stored(layer, k, v)
        if not step.causal:
            problem = replace(problem, block_causal=True)
            kernel = select("attention", problem, layer.forced).kernel
        return kernel.run(problem, q, k, v, step, cache, sinks)

    def as_stored(self, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they would come back from pages: for steps that cache nothing."""
        tokens = k.shape[0]
        pages = self.allocate(layer, 1, tokens, k.device)
        step = AttentionStep(slot_mapping=torch.arange(tokens, device=k.device))
        assert step.slot_mapping is not None
        layer.store_selection.kernel.run(layer.problem, k, v, pages, step)
        return pages.read(step.slot_mapping, k.dtype)

    def describe(self) -> str:
        """The method with its options, for people."""
        return self.name


@dataclass(frozen=True)
class UnquantizedKVCacheMethod(KVCacheMethodBase):
    """Plain floats.  dtype: None: the activations' own."""

    dtype: torch.dtype | None = None
    name: ClassVar[str] = "none"

    def kv_type(self, dtype: torch.dtype) -> KVType:
        return KVType(self.dtype or dtype)
