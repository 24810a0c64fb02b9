"""RMSNorm, with the residual sum fused into it; and LayerNorm."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm.config import current_execution
from pymllm.layers.elementwise import codes_between, elementwise_kernel
from pymllm.layers.held import WeightHolder
from pymllm.parallel import current_parallel
from pymllm.weights.spec import Span


class RMSNorm(WeightHolder):
    """x / sqrt(mean(x²) + eps), times a weight.  Float32 maths, then the input's dtype, then the weight.

    weight_offset: the number that is added to the stored weight.
    """

    weight: nn.Parameter | None
    weight_offset: ClassVar[float] = 0.0

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        has_weight: bool = True,
        *,
        params_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.kernel = eps, elementwise_kernel()
        execution = current_execution()
        if params_dtype is None and execution is not None:
            params_dtype = execution.dtype
        weight = nn.Parameter(torch.ones(hidden_size, dtype=params_dtype), requires_grad=False)
        self.register_parameter("weight", weight if has_weight else None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, taker: nn.Module | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise x [*, H].  Returns it; with a residual, (the normed sum of x and residual, that sum).

        taker: the only module that reads what is normed. If it asks for codes (`input_codes`), they are
        `QuantisedRows`; else, and without a taker, floats.
        """
        codes = codes_between(self, taker, x.shape[-1])
        if codes is not None:
            return self.kernel.rms_norm(x, self.weight, self.eps, residual, codes)
        return self.kernel.rms_norm(x, self.weight, self.eps, residual)


class LayerNorm(WeightHolder):
    """(x - mean(x)) / sqrt(variance(x) + eps), times a weight, plus a bias where there is one."""

    bias: nn.Parameter | None

    def __init__(self, hidden_size: int, eps: float, has_bias: bool = True) -> None:
        super().__init__()
        execution, self.eps = current_execution(), eps
        dtype = None if execution is None else execution.dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype), requires_grad=False)
        bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", bias if has_bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: [*, H].  Returns the same shape."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class GemmaRMSNorm(RMSNorm):
    """x / sqrt(mean(x²) + eps), times (1 + the stored weight).  All in float32, then the input's dtype."""

    weight_offset = 1.0

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps, params_dtype=torch.float32)
        assert self.weight is not None
        self.weight.data.zero_()
        self.finish()

    def finish(self) -> None:
        """Add 1 to the weight; called after each time that it is read."""
        assert self.weight is not None
        self.weight.data += self.weight_offset


class DividedRMSNorm(RMSNorm):
    """RMSNorm over features that ranks share: each brings its own to the mean.

    total: how many features there are.  share: which of them are this rank's.
    """

    def __init__(self, total: int, share: Span, eps: float) -> None:
        super().__init__(total, eps)
        self.total, self.share, self.parallel = total, share, current_parallel()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise x: [T, this rank's share of N].  Returns the same shape."""
        if self.parallel.size == 1:
            return super().forward(x)  # type: ignore[return-value]
        assert self.weight is not None
        squares = self.parallel.all_reduce(x.float().square().sum(-1, keepdim=True))
        summed = self.parallel.size * self.share.size  # more than the total where ranks share a head
        normed = x.float() * torch.rsqrt(squares / summed + self.eps)
        return normed.to(x.dtype) * self.weight[self.share.start : self.share.stop]
