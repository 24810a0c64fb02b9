"""Multi-head latent attention: keys and values come from a low-rank latent, and one rotated key serves all heads.

The cache holds the keys and values of every head, as any attention kernel takes them; it does not hold the latent.
"""

# T tokens, H heads, L rank of the latent, N, R, D sizes of a head: unrotated, rotated, value

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.attention.attention import Attention
from pymllm.config import ModelConfig
from pymllm.layers.layernorm import RMSNorm
from pymllm.layers.linear import ColumnParallelLinear, Linear, RowParallelLinear
from pymllm.layers.rotary_embedding import get_rope
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.spec import Span

LATENT_EPS = 1e-6  # the norms of latents use this one, whatever the config says of other norms


class LatentAttention(nn.Module):
    """Causal attention whose heads have N unrotated and R rotated features, over values of D features.

    interleaved: True where the two weights of a rotary pair lie side by side, instead of half a head apart.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        prefix: str,
        quant_config: QuantizationConfig | None,
        interleaved: bool = True,
    ) -> None:
        super().__init__()
        hidden, heads, bias = (
            config.size("hidden_size"),
            config.size("num_attention_heads"),
            config.attention_bias,
        )
        self.latent, self.plain = config.size("kv_lora_rank"), config.size("qk_nope_head_dim")
        self.rotated, self.value = config.size("qk_rope_head_dim"), config.size("v_head_dim")
        self.interleaved, head_dim = interleaved, self.plain + self.rotated

        def column(name: str, inputs: int, outputs: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs, outputs, False, False, prefix=f"{prefix}.{name}", quant_config=quant_config
            )

        def whole(name: str, outputs: int) -> Linear:
            return Linear(hidden, outputs, bias, prefix=f"{prefix}.{name}", quant_config=quant_config)

        rank = config.get("q_lora_rank")
        self.q_a_proj = None if rank is None else whole("q_a_proj", rank)
        self.q_a_layernorm = None if rank is None else RMSNorm(rank, LATENT_EPS)
        self.q_proj = column("q_proj" if rank is None else "q_b_proj", rank or hidden, heads * head_dim)
        self.kv_a_proj = whole("kv_a_proj_with_mqa", self.latent + self.rotated)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_EPS)
        self.kv_b_proj = column("kv_b_proj", self.latent, heads * (self.plain + self.value))
        self.o_proj = RowParallelLinear(
            heads * self.value, hidden, bias, prefix=f"{prefix}.o_proj", quant_config=quant_config
        )
        rope = config.rope_parameters
        self.rotary = get_rope(
            self.rotated,
            self.rotated,
            config.size("max_position_embeddings"),
            rope.theta,
            rope.scaling,
            rope.rope_type,
        )
        share = Span.even(heads, self.q_proj.tp_rank, self.q_proj.tp_size, f"{prefix}, heads")
        self.heads = share.size
        self.attn = Attention(
            self.heads,
            head_dim,
            head_dim**-0.5 * yarn_magnitude(rope.rope_type, rope.scaling) ** 2,
            self.heads,
            value_head_dim=self.value,
            quant_config=quant_config,
            kv_heads=share,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Attend.  positions: [T]; hidden: [T, hidden_size].  Returns [T, hidden_size]."""
        query = hidden
        if self.q_a_proj is not None and self.q_a_layernorm is not None:
            query = self.q_a_layernorm(self.q_a_proj(hidden))
        q = self.q_proj(query).unflatten(-1, (self.heads, -1))
        latent, shared = self.kv_a_proj(hidden).split([self.latent, self.rotated], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent.contiguous())).unflatten(-1, (self.heads, -1))
        k, v = kv.split([self.plain, self.value], dim=-1)
        q, q_rotated = q.split([self.plain, self.rotated], dim=-1)
        q_rotated, shared = self.rotary(positions, self._halves(q_rotated), self._halves(shared.unsqueeze(1)))
        q = torch.cat((q, q_rotated), dim=-1)
        k = torch.cat((k, shared.expand(-1, self.heads, -1)), dim=-1)
        return self.o_proj(self.attn(q, k, v.contiguous()).flatten(1))

    def _halves(self, x: Tensor) -> Tensor:
        """Sort x [T, H, R]: the first elements of all rotary pairs before the second ones, as `rotary` takes them.

        The order of pairs does not matter, as long as q and k have the same.
        """
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.interleaved else x.contiguous()


def yarn_magnitude(rope_type: str, settings: Mapping[str, Any]) -> float:
    """Return the factor on queries and keys that scaled positions ask for by `mscale_all_dim`; 1 without it."""
    weight, factor = settings.get("mscale_all_dim") or 0.0, settings.get("factor") or 1.0
    if rope_type == "default" or not weight or factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0
