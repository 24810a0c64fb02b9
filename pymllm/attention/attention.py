"""The attention layer: stores new keys and values in the paged cache, then runs the chosen kernel."""

# T tokens of this step, H query heads, Hkv key heads, D head size, P page size

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymllm.attention.metadata import AttnMetaDataBase, fetch_attn_metadata
from pymllm.config import Execution, current_execution
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import AttentionProblem, Selection, select


class Attention(nn.Module):
    """Causal attention of grouped heads over this step's tokens and what the cache holds.

    attn_impl: "auto", or a kernel's name.  k_cache, v_cache: [pages, P, Hkv, D], set by the runner; None: no cache.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        num_kv_heads: int,
        attn_impl: str = "auto",
        sliding_window: int | None = None,
        *,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.num_kv_heads, self.sliding_window, self.prefix = num_kv_heads, sliding_window, prefix
        execution = current_execution() or Execution()
        self.problem = AttentionProblem(
            num_heads, num_kv_heads, head_dim, execution.dtype, probe_device(execution.device), sliding_window
        )
        forced = execution.forced_kernel("attention") if attn_impl == "auto" else attn_impl
        self.selection: Selection = select("attention", self.problem, forced)
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [T, H·D] or [T, H, D]; k, v: [T, Hkv·D] or [T, Hkv, D].  Returns q's shape."""
        if q.shape[0] == 0:
            return torch.empty_like(q)
        metadata = fetch_attn_metadata()
        queries = q.view(-1, self.num_heads, self.head_dim)
        keys, values = (t.view(-1, self.num_kv_heads, self.head_dim) for t in (k, v))
        if self.k_cache is not None and self.v_cache is not None and metadata.need_kv_cache_store:
            assert metadata.slot_mapping is not None
            store_kv(keys, values, self.k_cache, self.v_cache, metadata.slot_mapping)
        return self._attend(queries, keys, values, metadata).reshape(q.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttnMetaDataBase) -> Tensor:
        assert metadata.cu_seqlens_q is not None and metadata.context_lens is not None
        run = self.selection.kernel.run
        bounds, lengths = metadata.cu_seqlens_q.tolist(), metadata.context_lens.tolist()
        outputs = []
        for request, (start, stop, length) in enumerate(zip(bounds[:-1], bounds[1:], lengths, strict=True)):
            if metadata.page_tables is None or length == stop - start:
                keys, values = k[start:stop], v[start:stop]
            else:
                assert self.k_cache is not None and self.v_cache is not None
                pages = metadata.page_tables[request, : -(-length // metadata.page_size)]
                keys = self.k_cache[pages].flatten(0, 1)[:length]
                values = self.v_cache[pages].flatten(0, 1)[:length]
            outputs.append(
                run(q[start:stop], keys, values, scale=self.scale, sliding_window=self.sliding_window)
            )
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys and values, [T, Hkv, D], to their slots of the cache; a slot below 0 is skipped."""
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        slot_mapping, k, v = slot_mapping[kept], k[kept], v[kept]
    k_cache.view(-1, *k_cache.shape[2:])[slot_mapping] = k.to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slot_mapping] = v.to(v_cache.dtype)
