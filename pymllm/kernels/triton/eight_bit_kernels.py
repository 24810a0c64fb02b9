"""Quantising activations to 8 bits, and multiplying 8-bit activations by 8-bit weights, on the GPU."""

# T tokens, O out_features, I in_features, G inputs of an activation's group, S splits

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


@inline
def round_half_even(value):
    """Round float32 values below 2^22 in magnitude: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (value + 12582912.0) - 12582912.0


@inline
def to_e4m3(value, HARDWARE: tl.constexpr):
    """Convert float32 within ±448 to float8_e4m3fn, to nearest even.

    HARDWARE: the GPU has the conversion; otherwise the result is the code's bits, in uint8.
    """
    if HARDWARE:
        result = value.to(tl.float8e4nv)
    else:
        size = tl.abs(value)
        # Normal: round off 20 bits of the fraction. Below 2^-6, codes are multiples of 2^-9.
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = round_half_even(size * 512.0).to(tl.int32)
        code = tl.where(size < 0.015625, small, normal) | tl.where(value < 0, 0x80, 0)
        result = code.to(tl.uint8)
    return result


@inline
def rounded(value, dtype: tl.constexpr, HARDWARE: tl.constexpr):
    """Round float32 to a 16-bit float, to nearest even, and return it as float32.

    Without HARDWARE the bits are rounded here, as the interpreter only truncates to bfloat16.
    """
    if HARDWARE or dtype == tl.float16:
        result = value.to(dtype).to(tl.float32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return result


@inline
def scale_of(
    peak, dtype: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, HARDWARE: tl.constexpr
):
    """Compute the scales of values whose largest magnitudes are `peak`, rounded to dtype."""
    return tl.maximum(rounded(tl.div_rn(peak, LARGEST), dtype, HARDWARE), SMALLEST)


@inline
def encoded(
    values, scale, dtype: tl.constexpr, LOW: tl.constexpr, INTEGER: tl.constexpr, HARDWARE: tl.constexpr
):
    """Encode values divided by scales of the same shape.  The quotients are rounded to dtype first."""
    quotient = rounded(tl.div_rn(values, scale), dtype, HARDWARE)
    if INTEGER:
        code = tl.minimum(tl.maximum(round_half_even(quotient), LOW), 127.0).to(tl.int8)
    else:
        code = to_e4m3(tl.minimum(tl.maximum(quotient, LOW), -LOW), HARDWARE)
    return code


@kernel(varying=("scale_stride",))
def quantise_rows(
    x,
    static,
    codes,
    scales,
    in_features,
    x_stride,
    scale_stride,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOW: tl.constexpr,
    INTEGER: tl.constexpr,
    HARDWARE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantise one group of a row.

    x: [T, I].  codes: [T, I].  scales: [I/G, T] float32, scale_stride apart.  Grid: (T, I/G).
    static: one scale for all of x, or None: a group's scale is its largest magnitude over LARGEST. Scales and quotients
    are rounded to x's dtype, as the writers of checkpoints do it.
    """
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    columns = group * GROUP + lanes
    mask = (lanes < GROUP) & (columns < in_features)
    dtype = x.dtype.element_ty
    values = tl.load(x + token * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if static is None:
        scale = scale_of(tl.max(tl.abs(values), axis=0), dtype, LARGEST, SMALLEST, HARDWARE)
    else:
        scale = tl.maximum(rounded(tl.load(static).to(tl.float32), dtype, HARDWARE), SMALLEST)
    code = encoded(values, tl.full((BLOCK,), 1.0, tl.float32) * scale, dtype, LOW, INTEGER, HARDWARE)
    tl.store(codes + token * in_features + columns, code, mask=mask)
    tl.store(scales + group.to(tl.int64) * scale_stride + token, scale)


@kernel(varying=("tokens", "x_scale_stride"))
def multiply_scaled(
    x,
    x_scales,
    weight,
    scales,
    zeros,
    bias,
    y,
    tokens,
    out_features,
    in_features,
    chunk,
    x_scale_stride,
    scale_in,
    scale_out,
    X_GROUP: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    INTEGER: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Multiply 8-bit activations by an 8-bit weight.

    x: [T, I] codes, x_scales: [I/X_GROUP, T], x_scale_stride apart.
    weight: [O, I] codes, scales: [I/GROUP_IN, O/GROUP_OUT], strides scale_in and scale_out.
    y: [T, O], or [S, T, O] float32.  zeros: [I/GROUP_IN, O] uint8, or None.
    Grid: (O / BLOCK_O, T / BLOCK_T, S).
    A step lies within one group of x and one of the weight, so its sum has one scale of each.  WHOLE: so have all steps
    together, which are scaled once, at the end; integers are then summed as such: of up to 2^15 inputs, in int32.
    """
    part = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask, token_mask = rows < out_features, token < tokens
    scale_places = scales + rows // GROUP_OUT * scale_out
    if WHOLE and INTEGER:
        total = tl.zeros((BLOCK_O, BLOCK_T), tl.int32)
    else:
        total = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    seen = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, in_features), BLOCK_I):
        columns = start + tl.arange(0, BLOCK_I)
        if EVEN:
            mask, x_mask = row_mask[:, None], token_mask[None, :]
        else:
            inside = columns < in_features
            mask, x_mask = row_mask[:, None] & inside[None, :], token_mask[None, :] & inside[:, None]
        left = tl.load(
            weight + rows.to(tl.int64)[:, None] * in_features + columns[None, :],
            mask=mask,
            other=0.0,
            eviction_policy="evict_first",
        )
        right = tl.load(
            x + token.to(tl.int64)[None, :] * in_features + columns[:, None], mask=x_mask, other=0.0
        )
        if WHOLE:
            if zeros is not None:
                seen += tl.sum(right.to(tl.int32), axis=0)
            if INTEGER:
                total = tl.dot(left, right, total, out_dtype=tl.int32)
            else:
                # Hopper adds in 14 bits within a dot: at most BLOCK_I products, then float32.
                total += tl.dot(left, right, max_num_imprecise_acc=BLOCK_I)
        else:
            group, x_group = start // GROUP_IN, start // X_GROUP
            scale = tl.load(scale_places + group * scale_in, mask=row_mask, other=0.0).to(tl.float32)
            x_scale = tl.load(x_scales + x_group * x_scale_stride + token, mask=token_mask, other=0.0)
            if INTEGER:
                product = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
            else:
                product = tl.dot(left, right, max_num_imprecise_acc=BLOCK_I)
            if zeros is not None:
                # Codes and zero points count from 128, so that they fit int8.
                zero = tl.load(zeros + group * out_features + rows, mask=row_mask, other=0).to(tl.float32)
                sums = tl.sum(right.to(tl.int32), axis=0).to(tl.float32)
                product -= (zero - 128.0)[:, None] * sums[None, :]
            total += product * scale[:, None] * x_scale[None, :]
    if WHOLE:
        if zeros is not None:
            zero = tl.load(zeros + rows, mask=row_mask, other=0).to(tl.int32) - 128
            total -= zero[:, None] * seen[None, :]
        scale = tl.load(scale_places, mask=row_mask, other=0.0).to(tl.float32)
        x_scale = tl.load(x_scales + token, mask=token_mask, other=0.0)
        result = total.to(tl.float32) * scale[:, None] * x_scale[None, :]
    else:
        result = total
    if bias is not None:
        result += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    places = (part.to(tl.int64) * tokens + token)[None, :] * out_features + rows[:, None]
    tl.store(y + places, result.to(y.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])
