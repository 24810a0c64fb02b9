"""torch's scaled_dot_product_attention, one request at a time over gathered pages."""

# T tokens, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV, seen_kv


class TorchAttention:
    """Attention by torch.nn.functional.scaled_dot_product_attention, with grouped heads, over every type of cache."""

    name = "torch_sdpa"

    def why_not(self, problem: AttentionProblem) -> str | None:
        if problem.soft_cap is not None:
            return "has no soft cap on logits"
        if problem.sinks:
            return "has no attention sinks"
        return None

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
        step.check_tokens(q.shape[0])
        outputs = []
        for request, (start, stop, _) in enumerate(step.spans):
            if start == stop:
                continue
            keys, values, first = seen_kv(problem, k, v, step, cache, request)
            outputs.append(self._attend(problem, q[start:stop], keys, values, step, request, first))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def _attend(
        problem: AttentionProblem,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        step: AttentionStep,
        request: int,
        first: int,
    ) -> Tensor:
        """Attend for the new tokens of one request.

        q: [Tq, H, D].  keys: [Tk, Hkv, D].  values: [Tk, Hkv, Dv].  first: the position of the first key.
        Returns [Tq, H, Dv].
        """
        queries, seen = q.shape[0], keys.shape[0]
        window = problem.sliding_window
        windowed = window is not None and seen > window
        both = problem.bidirectional
        causal = step.causal and queries > 1 and queries == seen and not windowed and not both
        everything = step.causal and (queries == 1 or both) and not windowed
        mask = None if causal or everything else step.visible(request, first, window, both)
        q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values))
        result = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            attn_mask=mask,
            is_causal=causal,
            scale=problem.scale,
            enable_gqa=problem.num_heads != problem.num_kv_heads,
        )
        return result.squeeze(0).transpose(0, 1)
