"""RMSNorm, silu·mul and rotary on the CPU in one pass each, in C++ (`kernels/elementwise.h`).

Results equal those of `pymllm/layers/` up to float32 rounding before the last step. Where `available` has a reason
against it, or the tensors are not for the native code, the same is done with torch operations.
"""

# T tokens, H hidden size, N half the gated size, D head size, R rotary size

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.cpu import native_available
from pymllm.kernels.native_float import FLOAT_TYPES, isa_code, native


def available() -> bool:
    """Whether the native code is built; without it these functions use torch operations."""
    return native_available()


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, *, isa: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps), times a weight.  With a residual: (normed x + residual, x + residual).

    x, residual: [*, H].  weight: [H].  All of one dtype.  isa: a kernel path, for tests.
    """
    others = [t for t in (weight, residual) if t is not None]
    if not _is_native(x, *others) or (residual is not None and residual.shape != x.shape):
        return _torch_rms_norm(x, weight, eps, residual)
    size = x.shape[-1]
    if weight is not None and weight.shape != (size,):
        raise ValueError(f"the weight must be [{size}], not {list(weight.shape)}")
    x = x.contiguous()
    weight = None if weight is None else weight.contiguous()
    y = torch.empty_like(x)
    summed = None
    if residual is not None:
        residual, summed = residual.contiguous(), torch.empty_like(x)
    native().rms_norm(
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        0 if weight is None else weight.data_ptr(),
        y.data_ptr(),
        0 if summed is None else summed.data_ptr(),
        FLOAT_TYPES[x.dtype],
        x.numel() // size if size else 0,
        size,
        eps,
        isa_code(isa),
        torch.get_num_threads(),
    )
    return y if summed is None else (y, summed)


def silu_and_mul(x: Tensor, *, isa: str | None = None) -> Tensor:
    """silu(gate) * up.  x: [*, 2N], gate first.  Returns [*, N]."""
    if x.shape[-1] % 2:
        raise ValueError(f"the last dimension holds gate and up and must be even, not {x.shape[-1]}")
    if not _is_native(x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    x = x.contiguous()
    size = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], size))
    native().silu_and_mul(
        x.data_ptr(),
        y.data_ptr(),
        FLOAT_TYPES[x.dtype],
        y.numel() // size if size else 0,
        size,
        isa_code(isa),
        torch.get_num_threads(),
    )
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, isa: str | None = None) -> Tensor:
    """Rotate the first R elements of each head, halves paired; the rest passes bit for bit.

    x: [T, heads, D]; a slice of a fused projection may have its tokens further apart.  cos, sin: [T, R/2] float32.
    Returns [T, heads, D], contiguous.
    """
    tokens, heads, head_size = x.shape
    rotary_size = 2 * cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] != tokens or rotary_size > head_size:
        raise ValueError(f"cos and sin must be [{tokens}, up to {head_size // 2}], not {list(cos.shape)}")
    if not _is_native(x) or cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        return _torch_rotate(x, cos, sin)
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.stride(2) != 1 or x.stride(1) != head_size or x.stride(0) < 0:
        x = x.contiguous()
    y = x.new_empty(x.shape)
    native().rotate(
        x.data_ptr(),
        y.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        FLOAT_TYPES[x.dtype],
        tokens,
        heads,
        head_size,
        rotary_size,
        x.stride(0),
        isa_code(isa),
        torch.get_num_threads(),
    )
    return y


def _is_native(x: Tensor, *others: Tensor) -> bool:
    dtype = x.dtype
    return (
        dtype in FLOAT_TYPES
        and native_available()
        and all(t.is_cpu and t.dtype is dtype and not t.is_meta for t in (x, *others))
    )


def _torch_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is not None:
        x = x + residual
    values = x.float()
    normed = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        normed = normed * weight
    return normed if residual is None else (normed, x)


def _torch_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary_size = 2 * cos.shape[-1]
    first, second = x[..., :rotary_size].float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., rotary_size:]), dim=-1)
