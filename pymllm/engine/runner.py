"""Runs the model over a batch of requests: builds the step's metadata, calls the model, hands back logits."""

# R requests, T tokens of this step, V vocabulary

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor

from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.models.causal_lm import CausalLM

# Of the step that this thread runs: ranks simulated by threads each have their own.
_metadata: ContextVar[AttnMetaDataBase] = ContextVar("attention_metadata")


class Runner:
    """One model on one device."""

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """One forward without a cache.  Returns float32 [T, V], on every rank."""
        count = len(token_ids)
        bounds = torch.tensor([0, count], dtype=torch.int32)
        metadata = AttnMetaDataBase(
            is_prefill=True,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=count,
            max_seqlen_k=count,
            context_lens=torch.tensor([count], dtype=torch.int32),
        )
        return self._forward(token_ids, list(range(count)), metadata, None)

    @torch.no_grad()
    def step(self, requests: list[Request], cache: PagedKVCache) -> Tensor:
        """Each request's tokens that the cache lacks (its prompt, or its last token).  Returns [R, V] logits."""
        new = [request.prompt if not request.answer else request.answer[-1:] for request in requests]
        starts = [request.length - len(tokens) for request, tokens in zip(requests, new, strict=True)]
        positions = [
            p for start, tokens in zip(starts, new, strict=True) for p in range(start, start + len(tokens))
        ]
        owners = [request for request, tokens in zip(requests, new, strict=True) for _ in tokens]
        size = cache.page_size
        slots = [o.pages[p // size] * size + p % size for o, p in zip(owners, positions, strict=True)]
        lengths_q = torch.tensor([0, *map(len, new)], dtype=torch.int32)
        lengths_k = torch.tensor([0, *(request.length for request in requests)], dtype=torch.int32)
        pages = torch.zeros((len(requests), max(len(r.pages) for r in requests)), dtype=torch.int64)
        for row, request in enumerate(requests):
            pages[row, : len(request.pages)] = torch.tensor(request.pages)
        bounds = lengths_q.cumsum(0, dtype=torch.int32)
        metadata = AttnMetaDataBase(
            is_prefill=any(len(tokens) > 1 for tokens in new),
            cu_seqlens_q=bounds,
            cu_seqlens_k=lengths_k.cumsum(0, dtype=torch.int32),
            max_seqlen_q=int(lengths_q.max()),
            max_seqlen_k=int(lengths_k.max()),
            slot_mapping=torch.tensor(slots, device=self.device),
            context_lens=lengths_k[1:],
            page_tables=pages.to(self.device),
            page_size=size,
        )
        return self._forward(
            [t for tokens in new for t in tokens], positions, metadata, bounds[1:].long() - 1
        )

    def _forward(
        self, tokens: list[int], positions: list[int], metadata: AttnMetaDataBase, rows: Tensor | None
    ) -> Tensor:
        set_fetch_fn_for_attn_metadata(_metadata.get)  # each time: another runner may have installed its own
        token = _metadata.set(metadata)
        try:
            hidden = self.model(
                torch.tensor(tokens, device=self.device), torch.tensor(positions, device=self.device)
            )
            if rows is not None:
                hidden = hidden[rows.to(self.device)]
            logits = self.model.compute_logits(hidden, gather_all=True)
        finally:
            _metadata.reset(token)
        assert logits is not None
        return logits
