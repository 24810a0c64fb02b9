"""The reference kernel for attention: the formula in float32, one request at a time."""

# T tokens, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV, seen_kv


class ReferenceAttention:
    """softmax(cap(q kᵀ · scale)) v in float32, written out."""

    name = "reference"

    def why_not(self, problem: AttentionProblem) -> str | None:
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
        result = q.new_empty((q.shape[0], problem.num_heads, problem.value_head_dim))
        repeats = problem.num_heads // problem.num_kv_heads
        for request, (start, stop, _) in enumerate(step.spans):
            keys, values, first = seen_kv(problem, k, v, step, cache, request)
            keys, values = (t.float().repeat_interleave(repeats, dim=1) for t in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), keys) * problem.scale
            if problem.soft_cap is not None:
                scores = (scores / problem.soft_cap).tanh() * problem.soft_cap
            seen = step.visible(request, first, problem.sliding_window, problem.bidirectional)
            scores = scores.masked_fill(~seen, -math.inf)
            if sinks is not None:
                column = sinks.float().view(-1, 1, 1).expand(-1, stop - start, 1)
                weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            result[start:stop] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        return result
