"""RMSNorm, gated activations and rotary positions on the GPU, each in one pass over memory."""

# T tokens, H hidden size, N half the gated size, D head size, R rotary size

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


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
    """Normalise one row of x, or of x plus the residual.

    x, residual: [T, H].  y, summed: [T, H].  WHOLE: a row fits one block, and is read once.  Grid: (T,).
    """
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


@inline
def gated(gate, up, ACTIVATION: tl.constexpr):
    """Multiply activation(gate), rounded to its dtype, by up, and round the product to that dtype.

    ACTIVATION: "silu", or "gelu" in the tanh approximation.
    """
    wide = gate.to(tl.float32)
    inner = wide
    if ACTIVATION == "gelu":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u; 2 * sqrt(2 / pi) = 1.5957691216057308.
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
    active = (wide / (1.0 + tl.exp2(-1.4426950408889634 * inner))).to(gate.dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(gate.dtype)


@kernel
def gate_rows(x, y, size, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply activation(gate) by up in one block of a row.  x: [T, 2N].  y: [T, N].  Grid: (T, N / BLOCK)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(x + row * stride + size + columns, mask=mask, other=0.0)
    tl.store(y + row * size + columns, gated(gate, up, ACTIVATION), mask=mask)


@inline
def rotated_halves(source, cos, sin, token, lanes, head_mask, SIZE: tl.constexpr, HALF: tl.constexpr):
    """Rotate the first 2 * HALF elements of heads.  Returns both halves, and the elements after them, in their dtype.

    source: pointers to the first elements of heads, [heads, lanes].  cos, sin: [T, HALF].
    """
    mask = (lanes < HALF)[None, :]
    first = tl.load(source, mask=head_mask & mask, other=0.0)
    second = tl.load(source + HALF, mask=head_mask & mask, other=0.0)
    c = tl.load(cos + token * HALF + lanes, mask=lanes < HALF, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + lanes, mask=lanes < HALF, other=0.0)[None, :]
    one, other = first.to(tl.float32), second.to(tl.float32)
    rest = first
    if SIZE > 2 * HALF:
        rest = tl.load(source + 2 * HALF, mask=head_mask & (lanes < SIZE - 2 * HALF)[None, :], other=0.0)
    return (one * c - other * s).to(first.dtype), (other * c + one * s).to(first.dtype), rest


@kernel
def rotate_heads(
    x,
    cos,
    sin,
    y,
    stride,
    head_stride,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate the first 2 * HALF elements of BLOCK_H heads of a token, and copy the rest.

    x: [T, HEADS, SIZE].  cos, sin: [T, HALF].  y: [T, HEADS, SIZE].  Grid: (T, HEADS / BLOCK_H).
    """
    token, heads = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    lanes = tl.arange(0, BLOCK)
    mask = heads < HEADS
    source = x + token * stride + heads * head_stride + lanes[None, :]
    first, second, rest = rotated_halves(source, cos, sin, token, lanes, mask, SIZE, HALF)
    target = y + (token * HEADS + heads) * SIZE + lanes[None, :]
    tl.store(target, first, mask=mask & (lanes < HALF)[None, :])
    tl.store(target + HALF, second, mask=mask & (lanes < HALF)[None, :])
    if SIZE > 2 * HALF:
        tl.store(target + 2 * HALF, rest, mask=mask & (lanes < SIZE - 2 * HALF)[None, :])
