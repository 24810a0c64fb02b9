"""RMSNorm, gated activations and rotary positions in torch operations, for any device and any float dtype."""

# T tokens, H hidden size, N half the gated size, D head size, R rotary size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.elementwise import ElementwiseProblem


class TorchElementwise:
    """Norms, gated activations and rotary positions, every step of them a torch operation."""

    name = "torch"

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        return None

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x to x / sqrt(mean(x²) + eps), and multiply it by the weight.

        x, residual: [*, H].  weight: [H].  Returns [*, H]; with a residual, the normed x + residual, and x + residual.
        The maths is in float32.  The result is rounded to x's dtype before the weight multiplies it; but a float32
        weight multiplies first, and the product is rounded.
        """
        if residual is not None:
            x = x + residual
        values = x.float()
        normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
        if weight is not None and weight.dtype is torch.float32:
            normed = normed * weight
        normed = normed.to(x.dtype)
        if weight is not None and weight.dtype is not torch.float32:
            normed = normed * weight
        return normed if residual is None else (normed, x)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """Multiply silu(gate) by up.  x: [*, 2N], gate first.  Returns [*, N]."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        """Multiply gelu(gate), in the tanh approximation, by up.  x: [*, 2N], gate first.  Returns [*, N]."""
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first R elements of each head, halves paired; leave the rest as it is, bit for bit.

        x: [T, heads, D].  cos, sin: [T, R/2] float32.  The maths is in float32.  Returns x's shape and dtype.
        """
        rotary_size = 2 * cos.shape[-1]
        first, second = x[..., :rotary_size].float().chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return rotated if rotary_size == x.shape[-1] else torch.cat((rotated, x[..., rotary_size:]), dim=-1)
