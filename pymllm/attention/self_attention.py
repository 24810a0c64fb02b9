"""The self-attention block that most decoders have: q, k, v in one matmul, rotary positions, attention, output."""

# T tokens, H query heads, Hkv key heads, D head size

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.attention.attention import Attention
from pymllm.config import ModelConfig
from pymllm.kernels.quantised_rows import RowCodes
from pymllm.layers.layernorm import DividedRMSNorm, RMSNorm
from pymllm.layers.linear import QKVParallelLinear, RowParallelLinear
from pymllm.layers.rotary_embedding import get_rope
from pymllm.quantization.base import QuantizationConfig


class SelfAttention(nn.Module):
    """Causal grouped-query attention.

    qkv_bias, output_bias: whether the projections have one.  part_names: the names of the checkpoint's tensors; if
    there is one name, q, k and v lie side by side in that tensor.  output_name: the name of the output projection.
    qk_norm: the norm of each head of q and k (Qwen3).  rotary_dim: how much of a head turns; None: as the config says.
    scale: the factor of the logits; None: 1 / sqrt(head size).  soft_cap: the limit of the scaled logits.
    sinks: whether each head has one more logit, which takes part in the softmax without a value (gpt_oss).
    bidirectional: whether a token sees those after it, too; a window then has half of its positions on either side.
    reads_input: the names of the layers that multiply the hidden states as they come.  qkv_layer: the class of the
    layer of q, k and v.
    """

    qkv_layer: ClassVar[type[QKVParallelLinear]] = QKVParallelLinear
    sinks: nn.Parameter | None
    reads_input: ClassVar[tuple[str, ...]] = ("qkv_proj",)

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        prefix: str,
        quant_config: QuantizationConfig | None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        part_names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
        output_name: str = "o_proj",
        qk_norm: type[RMSNorm] | None = None,
        rotary_dim: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        window = config.sliding_window_of(layer)
        if bidirectional and window is not None:
            window = window // 2 + 1
        head_dim, num_heads = config.head_dim, config.size("num_attention_heads")
        self.config, self.head_dim = config, head_dim
        self.qkv_proj = self.qkv_layer(
            config.size("hidden_size"),
            head_dim,
            num_heads,
            config.num_key_value_heads,
            qkv_bias,
            part_names=part_names,
            prefix=f"{prefix}.{part_names[0] if len(part_names) == 1 else 'qkv_proj'}",
            quant_config=quant_config,
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            config.size("hidden_size"),
            output_bias,
            prefix=f"{prefix}.{output_name}",
            quant_config=quant_config,
        )
        self.q_norm = qk_norm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = qk_norm(head_dim, config.rms_norm_eps) if qk_norm else None
        weight = torch.empty(num_heads, dtype=self.qkv_proj.params_dtype)
        self.register_parameter("sinks", nn.Parameter(weight, requires_grad=False) if sinks else None)
        rope = config.rope_parameters_of(layer)
        self.rotary = get_rope(
            head_dim,
            int(head_dim * rope.partial_rotary_factor) if rotary_dim is None else rotary_dim,
            config.size("max_position_embeddings"),
            rope.theta,
            rope.scaling,
            rope.rope_type,
        )
        self.attn = Attention(
            self.qkv_proj.num_heads_local,
            head_dim,
            head_dim**-0.5 if scale is None else scale,
            self.qkv_proj.num_kv_heads_local,
            sliding_window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            bidirectional=bidirectional,
            quant_config=quant_config,
            kv_heads=self.qkv_proj.kv_heads,
            prefix=f"{prefix}.attn",
        )

    @property
    def input_codes(self) -> RowCodes | None:
        """The codes in which `hidden` may come; None: floats only."""
        return None if self._forward_pre_hooks or self._forward_hooks else self.qkv_proj.input_codes

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """Attend.  positions: [T]; hidden: [T, hidden_size] or in `input_codes`.  Returns [T, hidden_size]."""
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.local_sizes, dim=-1)
        q, k, v = self.before_rotary(q, k, v)
        return self.o_proj(self.attend(positions, q, k, v))

    def attend(self, positions: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate q and k, and attend.

        q, k, v: [T, this rank's features of all heads], from `before_rotary`.  Returns the shape of q.
        """
        rotary = self.rotary
        if self.attn.rotates_as(rotary):
            return self.attn(q, k, v, self.sinks_here(), rotary.angles(positions))
        q, k = self.rotary(positions, q, k)
        return self.attn(q, k, v, self.sinks_here())

    def before_rotary(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise each head of q and k, where there are norms.

        q, k, v: [T, this rank's features of all heads].  Returns the same shapes.
        """
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return q, k, v

    def sinks_here(self) -> Tensor | None:
        """Return the sinks of this rank's heads, [H]; None: the layer has none."""
        heads = self.qkv_proj.shape.outputs[0]
        first = heads.start // self.head_dim
        return None if self.sinks is None else self.sinks[first : first + heads.size // self.head_dim]


class WholeNormAttention(SelfAttention):
    """Self-attention with one norm over all heads of q, and one over all heads of k."""

    def __init__(self, config: ModelConfig, layer: int, **options: Any) -> None:
        super().__init__(config, layer, **options)
        eps, (q, k, _) = config.rms_norm_eps, self.qkv_proj.shape.outputs
        self.q_norm, self.k_norm = DividedRMSNorm(q.total, q, eps), DividedRMSNorm(k.total, k, eps)

    def before_rotary(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise q and k.  q, k, v: [T, this rank's features of all heads].  Returns the same shapes."""
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm(q), self.k_norm(k), v
