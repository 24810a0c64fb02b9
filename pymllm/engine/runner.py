"""Runs the model over a batch of requests: builds the step's metadata, calls the model, hands back logits."""

# R requests, T tokens of this step, V vocabulary

from __future__ import annotations

from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.layers.lora import AdapterBatch, use_adapters
from pymllm.models.causal_lm import CausalLM

# Of the step that this thread runs: ranks simulated by threads each have their own.
_metadata: ContextVar[AttnMetaDataBase] = ContextVar("attention_metadata")


class Runner:
    """One model on one device."""

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: str | None = None) -> Tensor:
        """One forward without a cache.  Returns float32 [T, V], on every rank."""
        count = len(token_ids)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=self.device)
        metadata = AttnMetaDataBase(
            is_prefill=True,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=count,
            max_seqlen_k=count,
            context_lens=bounds[1:],
            query_starts=(0, count),
            lengths=(count,),
        )
        return self._forward(token_ids, list(range(count)), metadata, None, [adapter], [count])

    @torch.no_grad()
    def step(self, requests: list[Request], cache: PagedKVCache) -> Tensor:
        """Each request's tokens that the cache lacks (its prompt, or its last token).  Returns [R, V] logits."""
        new = [request.start_step() for request in requests]
        starts = [request.length - len(tokens) for request, tokens in zip(requests, new, strict=True)]
        positions = [
            p for start, tokens in zip(starts, new, strict=True) for p in range(start, start + len(tokens))
        ]
        owners = [request for request, tokens in zip(requests, new, strict=True) for _ in tokens]
        size = cache.page_size
        slots = [o.pages[p // size] * size + p % size for o, p in zip(owners, positions, strict=True)]
        lengths = [request.length for request in requests]
        bounds_q, bounds_k = ([0, *accumulate(counts)] for counts in (map(len, new), lengths))
        most = max(len(request.pages) for request in requests)
        pages = [request.pages + [0] * (most - len(request.pages)) for request in requests]
        metadata = AttnMetaDataBase(
            is_prefill=[request.is_prefilling for request in requests],
            cu_seqlens_q=self._int32(bounds_q),
            cu_seqlens_k=self._int32(bounds_k),
            max_seqlen_q=max(map(len, new)),
            max_seqlen_k=max(lengths),
            slot_mapping=torch.tensor(slots, device=self.device),
            context_lens=self._int32(lengths),
            page_tables=self._int32(pages),
            page_size=size,
            query_starts=bounds_q,
            lengths=lengths,
        )
        last = torch.tensor([bound - 1 for bound in bounds_q[1:]])
        flat = [token for tokens in new for token in tokens]
        adapters = [request.adapter for request in requests]
        return self._forward(flat, positions, metadata, last, adapters, list(map(len, new)))

    def _int32(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _forward(
        self,
        tokens: list[int],
        positions: list[int],
        metadata: AttnMetaDataBase,
        rows: Tensor | None,
        adapters: list[str | None],
        counts: list[int],
    ) -> Tensor:
        """rows: those whose logits are wanted, one a request; None: all.  adapters, counts: of each request."""
        wide = AdapterBatch.of(
            [name for name, count in zip(adapters, counts, strict=True) for _ in range(count)], self.device
        )
        narrow = wide if rows is None else AdapterBatch.of(adapters, self.device)
        set_fetch_fn_for_attn_metadata(_metadata.get)  # each time: another runner may have installed its own
        token = _metadata.set(metadata)
        try:
            with use_adapters(wide):
                hidden = self.model(
                    torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device)
                )
            if rows is not None:
                hidden = hidden[rows.to(self.device)]
            with use_adapters(narrow):
                logits = self.model.compute_logits(hidden, gather_all=True)
        finally:
            _metadata.reset(token)
        assert logits is not None
        return logits
