"""Norms of ours in the places of modules that compute the same, as a trial on each of them shows."""

# H hidden size

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymllm.kernels.aten.elementwise import TorchElementwise
from pymllm.layers.layernorm import GemmaRMSNorm, RMSNorm
from pymllm.models.generic.classes import on_cpu

UNWEIGHTED_SIZE = 16  # of the rows that a norm without a weight is tried on
MAGNITUDES = (1e-3, 1e-2, 1.0, 30.0)  # the smallest show what is added to the mean


class GenericRMSNorm(RMSNorm):
    """A norm of transformers', called with the rows alone."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise the one argument, [*, H]."""
        (x,) = (*args, *named.values())
        return super().forward(x)  # type: ignore[return-value]


class GenericOffsetRMSNorm(GemmaRMSNorm):
    """A norm of transformers' that adds 1 to its weight, called with the rows alone."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise the one argument, [*, H]."""
        (x,) = (*args, *named.values())
        return super().forward(x)  # type: ignore[return-value]


class GenericLayerNorm(nn.Module):
    """A layer norm of transformers' without a bias, in one operation of torch's, called with the rows alone."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        """Normalise the one argument, [*, H]."""
        (x,) = (*args, *named.values())
        return F.layer_norm(x, self.weight.shape, self.weight, eps=self.eps)


@on_cpu
def make_norm(module: Any, dtype: torch.dtype) -> nn.Module | None:
    """Make our norm for a module that computes one.  None: it computes something else.

    dtype: of activations.  In 16 bits the module must round as ours do, bit for bit.
    """
    weight = module._parameters.get("weight")
    others = module._modules or module._buffers or module._parameters.keys() - {"weight"}
    if others or isinstance(module, nn.LayerNorm) or (weight is not None and weight.ndim != 1):
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 1]
    if not numbers:
        return None
    size = UNWEIGHTED_SIZE if weight is None else weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    x = torch.stack([m * torch.randn((2, size), generator=draw) for m in MAGNITUDES]).to(dtype)
    stored = None if weight is None else torch.randn(size, generator=draw).to(weight.dtype)
    try:
        if stored is not None:
            module._parameters["weight"] = nn.Parameter(stored, requires_grad=False)
        result = module(x.clone())
    except Exception:
        return None
    finally:
        if weight is not None:
            module._parameters["weight"] = weight
    if not isinstance(result, Tensor) or result.dtype is not dtype:
        return None
    for eps in dict.fromkeys(numbers):
        if _equal(result, x, stored, eps):
            return _unoffset(size, eps, None if stored is None else stored.dtype)
        if stored is not None and _equal(result, x, stored.float(), eps):
            return _unoffset(size, eps, torch.float32)
        if stored is not None and _equal(result, x, 1 + stored.float(), eps):
            with torch.device("meta"):
                return GenericOffsetRMSNorm(size, eps)
        plain = stored is not None and stored.dtype is dtype
        if plain and _close(F.layer_norm(x, (size,), stored, eps=eps), result):
            return GenericLayerNorm(size, eps, dtype)
    return None


def _unoffset(size: int, eps: float, weight: torch.dtype | None) -> RMSNorm:
    with torch.device("meta"):
        return GenericRMSNorm(size, eps, weight is not None, params_dtype=weight)


def _equal(result: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> bool:
    """Tell whether a result is our norm's."""
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        return False
    ours = TorchElementwise().rms_norm(x, weight, eps)
    assert isinstance(ours, Tensor)
    return _close(ours, result)


def _close(ours: Tensor, result: Tensor) -> bool:
    """Tell whether two results are equal: bit for bit where they were rounded to 16 bits."""
    if ours.dtype is not torch.float32:
        return torch.equal(ours, result)
    return torch.allclose(ours, result, rtol=1e-6, atol=1e-6)
