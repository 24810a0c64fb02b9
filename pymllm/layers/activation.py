"""Gated activations over the two halves of the last dimension."""

from __future__ import annotations

from torch import Tensor, nn

from pymllm.layers.elementwise import codes_between, elementwise_kernel


class SiluAndMul(nn.Module):
    """silu(gate) * up.  x: [*, 2N], gate first.  Returns [*, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = elementwise_kernel()

    def forward(self, x: Tensor, taker: nn.Module | None = None) -> Tensor:
        """Compute silu(gate) * up.  taker: as in `RMSNorm.forward`."""
        codes = codes_between(self, taker, x.shape[-1] // 2)
        return self.kernel.silu_and_mul(x) if codes is None else self.kernel.silu_and_mul(x, codes)


class GeluAndMul(nn.Module):
    """gelu(gate) * up, in the tanh approximation.  x: [*, 2N], gate first.  Returns [*, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = elementwise_kernel()

    def forward(self, x: Tensor, taker: nn.Module | None = None) -> Tensor:
        """Compute gelu(gate) * up.  taker: as in `RMSNorm.forward`."""
        codes = codes_between(self, taker, x.shape[-1] // 2)
        return self.kernel.gelu_and_mul(x) if codes is None else self.kernel.gelu_and_mul(x, codes)
