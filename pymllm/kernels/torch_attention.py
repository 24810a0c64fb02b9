"""torch's scaled_dot_product_attention, one request at a time."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.reference import causal_mask
from pymllm.kernels.registry import AttentionProblem


class TorchAttention:
    """torch.nn.functional.scaled_dot_product_attention with grouped heads."""

    name = "torch_sdpa"

    def why_not(self, problem: AttentionProblem) -> str | None:
        if problem.num_heads % problem.num_kv_heads:
            return f"{problem.num_heads} query heads are not a multiple of {problem.num_kv_heads} key heads"
        return None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None = None
    ) -> Tensor:
        """One request.  q: [Tq, H, D], the last Tq of Tk positions; k, v: [Tk, Hkv, D].  Returns [Tq, H, D]."""
        queries, keys = q.shape[0], k.shape[0]
        windowed = sliding_window is not None and keys > sliding_window
        causal = queries > 1 and queries == keys and not windowed
        needs_mask = windowed or (queries > 1 and not causal)
        mask = causal_mask(queries, keys, sliding_window, q.device) if needs_mask else None
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        result = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return result.squeeze(0).transpose(0, 1)
