"""Self-attention whose outputs are multiplied by the sigmoid of a gate, which the query projection computes too."""

# T tokens, H query heads, D head size

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pymllm.attention.self_attention import SelfAttention
from pymllm.layers.linear import QKVParallelLinear
from pymllm.weights.spec import Span


class GatedQKVLinear(QKVParallelLinear):
    """q, k and v in one matmul; each head of q_proj has D outputs of q, then D of the gate."""

    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, *args: Any, **options: Any
    ) -> None:
        self.gated_heads = total_num_heads
        super().__init__(hidden_size, head_size, 2 * total_num_heads, *args, **options)
        self.num_heads_local //= 2

    def shard(self, rank: int, size: int) -> tuple[Span, tuple[Span, ...]]:
        # A rank has whole heads, each with its gate.
        Span.even(self.gated_heads, rank, size, f"{self.prefix or type(self).__name__}, query heads")
        return super().shard(rank, size)


class GatedAttention(SelfAttention):
    """Self-attention with a gate of each output."""

    qkv_layer: ClassVar[type[QKVParallelLinear]] = GatedQKVLinear

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Attend.  positions: [T]; hidden: [T, hidden_size] or in `input_codes`.  Returns [T, hidden_size]."""
        gated, k, v = self.qkv_proj(hidden).split(self.qkv_proj.local_sizes, dim=-1)
        q, gate = gated.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        q, k, v = self.before_rotary(q.flatten(1), k, v)
        return self.o_proj(self.attend(positions, q, k, v) * torch.sigmoid(gate.flatten(1)))
