"""Gated activations over the two halves of the last dimension."""

from __future__ import annotations

from torch import Tensor, nn

from pymllm.layers.elementwise import elementwise_kernel


class SiluAndMul(nn.Module):
    """silu(gate) * up.  x: [*, 2N], gate first.  Returns [*, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = elementwise_kernel()

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.silu_and_mul(x)


class GeluAndMul(nn.Module):
    """gelu(gate) * up, in the tanh approximation.  x: [*, 2N], gate first.  Returns [*, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = elementwise_kernel()

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.gelu_and_mul(x)
