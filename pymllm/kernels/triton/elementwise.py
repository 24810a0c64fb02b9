"""RMSNorm, silu·mul and rotary positions on the GPU, each in one pass over memory.

Roundings are those of `torch_elementwise`: results differ by float32 rounding before the last step.
"""

# T tokens, H hidden size, N half the gated size, D head size, R rotary size

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device
from pymllm.kernels.registry import ElementwiseProblem
from pymllm.kernels.triton.ahead_of_time import Case
from pymllm.kernels.triton.launch import kernel
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.requirements import FLOATS, why_not_device
from pymllm.kernels.triton.tuning import divide, next_power

if TYPE_CHECKING:
    import triton.language as tl

LONGEST_ROW = 1 << 15


class TritonElementwise:
    """A row, or a part of one, for each block."""

    name = "triton"
    device_type = "cuda"  # the only one it runs on

    def why_not(self, problem: ElementwiseProblem) -> str | None:
        if problem.dtype not in (*FLOATS, torch.float32):
            return f"computes in float32, float16 or bfloat16, not in {problem.dtype}"
        return why_not_device(problem.device)

    def rms_norm(
        self, x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `TorchElementwise.rms_norm`."""
        normed, summed = rms_norm(x, weight, eps, residual)
        return normed if residual is None else (normed, summed)

    def silu_and_mul(self, x: Tensor) -> Tensor:
        """As `TorchElementwise.silu_and_mul`."""
        return silu_and_mul(x)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `TorchElementwise.rotate`; x may be a slice of a fused projection."""
        return rotate(x, cos, sin)

    def cases(self, device: Device) -> Iterator[Case]:
        for hidden, tokens, dtype in (
            (4096, 1, torch.bfloat16),
            (8192, 512, torch.bfloat16),
            (1000, 3, torch.float16),
        ):
            x = torch.empty((tokens, hidden), dtype=dtype, device="meta")
            q, table = x.view(tokens, -1, hidden // 8), torch.empty((tokens, hidden // 16), device="meta")
            title = f"{str(dtype).removeprefix('torch.')}, {tokens} x {hidden}"
            yield Case(f"norm, {title}", lambda x=x: self.rms_norm(x, x[0], 1e-6))  # type: ignore[misc]
            yield Case(f"norm of a sum, {title}", lambda x=x: self.rms_norm(x, x[0], 1e-6, x))  # type: ignore[misc]
            yield Case(f"silu, {title}", lambda x=x: self.silu_and_mul(x))  # type: ignore[misc]
            yield Case(f"rotate, {title}", lambda q=q, t=table: self.rotate(q, t, t))  # type: ignore[misc]


@operator(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual) -> (Tensor, Tensor)",
    lambda x, weight, eps, residual: (
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(x),
    ),
)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x, residual: [*, H].  Returns the normed sum and the sum; that is empty without a residual."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    summed = x.new_empty(0) if residual is None else torch.empty_like(y)
    if rows.shape[0] and size:
        others = None if residual is None else residual.reshape(-1, size)
        block = min(next_power(size), LONGEST_ROW)
        norm_rows.launch(
            (rows.shape[0],),
            rows,
            others if others is None or others.stride(-1) == 1 else others.contiguous(),
            weight,
            y,
            None if residual is None else summed,
            size,
            rows.stride(0),
            0 if others is None else others.stride(0),
            eps,
            FLOAT_WEIGHT=weight is not None and weight.dtype is torch.float32,
            WHOLE=size <= block,
            BLOCK=block,
            num_warps=min(16, max(1, block // 256)),
        )
    return y, summed


@operator("silu_and_mul(Tensor x) -> Tensor", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def silu_and_mul(x: Tensor) -> Tensor:
    """x: [*, 2N], gate first.  Returns [*, N]."""
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    y = x.new_empty((*x.shape[:-1], size))
    if y.numel():
        block = min(next_power(size), 1024)
        grid = (rows.shape[0], divide(size, block))
        gate_rows.launch(grid, rows, y, size, rows.stride(0), BLOCK=block, num_warps=4)
    return y


@operator("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", lambda x, cos, sin: x.new_empty(x.shape))
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [T, heads, D].  cos, sin: [T, R/2] float32.  Returns [T, heads, D]."""
    tokens, heads, size = x.shape
    y = x.new_empty(x.shape)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        half = cos.shape[-1]
        block = next_power(max(half, size - 2 * half))
        rotate_heads.launch(
            (tokens, heads),
            x,
            cos.contiguous(),
            sin.contiguous(),
            y,
            x.stride(0),
            x.stride(1),
            SIZE=size,
            HALF=half,
            BLOCK=block,
            num_warps=1,
        )
    return y


@kernel
def norm_rows(
    x,
    residual,
    weight,
    y,
    summed,
    size,
    x_stride,
    residual_stride,
    eps,
    FLOAT_WEIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x, residual: [T, H].  y, summed: [T, H].  WHOLE: a row fits one block, and is read once.  Grid: (T,)."""
    row = tl.program_id(0).to(tl.int64)
    dtype = y.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    values = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        mask = columns < size
        values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            values += tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
            total = values.to(dtype)
            tl.store(summed + row * size + columns, total, mask=mask)
            values = total.to(tl.float32)
        squares += values * values
    factor = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / size + eps)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        mask = columns < size
        if not WHOLE:
            if residual is not None:
                values = tl.load(summed + row * size + columns, mask=mask, other=0.0).to(tl.float32)
            else:
                values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        result = values * factor
        if weight is not None:
            factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
            if not FLOAT_WEIGHT:
                result = result.to(dtype).to(tl.float32)
            result *= factors
        tl.store(y + row * size + columns, result.to(dtype), mask=mask)


@kernel
def gate_rows(x, y, size, stride, BLOCK: tl.constexpr):
    """x: [T, 2N].  y: [T, N].  Grid: (T, N / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(x + row * stride + size + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide / (1.0 + tl.exp2(-1.4426950408889634 * wide))).to(gate.dtype).to(tl.float32)
    tl.store(y + row * size + columns, (active * up.to(tl.float32)).to(gate.dtype), mask=mask)


@kernel
def rotate_heads(
    x, cos, sin, y, stride, head_stride, SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """x: [T, heads, SIZE].  cos, sin: [T, HALF].  y: [T, heads, SIZE].  Grid: (T, heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < HALF
    source = x + token * stride + head * head_stride
    target = y + (token * tl.num_programs(1) + head) * SIZE
    first = tl.load(source + lanes, mask=mask, other=0.0)
    second = tl.load(source + HALF + lanes, mask=mask, other=0.0)
    c = tl.load(cos + token * HALF + lanes, mask=mask, other=0.0)
    s = tl.load(sin + token * HALF + lanes, mask=mask, other=0.0)
    one, other = first.to(tl.float32), second.to(tl.float32)
    tl.store(target + lanes, (one * c - other * s).to(first.dtype), mask=mask)
    tl.store(target + HALF + lanes, (other * c + one * s).to(first.dtype), mask=mask)
    if SIZE > 2 * HALF:
        rest = lanes < SIZE - 2 * HALF
        tl.store(
            target + 2 * HALF + lanes, tl.load(source + 2 * HALF + lanes, mask=rest, other=0.0), mask=rest
        )
