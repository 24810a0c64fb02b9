"""Products of weights of few bits with activations that are left as they are, on the GPU; see `weight_only.py`."""

# T tokens, O out_features, I in_features, W words a row, N codes a word, G inputs of a group, S splits, E experts

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


@inline
def scale_value(stored, KIND: tl.constexpr):
    """Convert a stored scale to float32.  KIND: as `Coding.scale_kind`."""
    # e8m0 is 2^(byte - 127); byte 0 is 2^-127, which only a subnormal holds.
    if KIND == "e8m0":
        exponent = stored.to(tl.int32)
        return tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    elif KIND == "e4m3":
        return e4m3_value(stored.to(tl.int32))
    else:
        return stored.to(tl.float32)


@inline
def e4m3_value(byte):
    """Decode float8_e4m3fn from its byte, in int32.

    Its fields move to those of float32, and 2^120 evens the exponents' bias.
    """
    size = byte & 0x7F
    # 1.329227995784916e36 is 2^120.
    value = ((size << 20) | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(size == 0x7F, float("nan"), value)


@inline
def scales_and_zeros(
    scales,
    zeros,
    rows,
    columns,
    mask,
    out_features,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """Load, for each word of a tile, its scale and what to subtract from its decoded codes."""
    group = (columns // GROUP_WORDS).to(tl.int64)
    stride = (out_features + GROUP_ROWS - 1) // GROUP_ROWS
    if scales is None:
        scale = tl.full((rows.shape[0], columns.shape[0]), 1.0, tl.float32)
    else:
        place = group[None, :] * stride + (rows // GROUP_ROWS)[:, None]
        scale = scale_value(tl.load(scales + place, mask=mask, other=0), SCALE_KIND)
    if zeros is None:
        zero = tl.full(scale.shape, OFFSET + ZERO, tl.float32)
    else:
        stored = tl.load(zeros + group[None, :] * out_features + rows[:, None], mask=mask, other=0)
        zero = stored.to(tl.float32) + OFFSET
    return scale, zero


@kernel(varying=("experts",))
def multiply_one(
    x,
    words,
    scales,
    zeros,
    row_scales,
    bias,
    y,
    experts,
    out_features,
    row_words,
    chunk,
    x_stride,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Multiply one row by the weight, or each slot's row by its expert's weight.

    x: [I].  y: [O], or [S, O] float32.  Grid: (O / BLOCK_O, S, 1).
    With experts, [slots] int64: x: [slots / TOP_K, I], words: [E, O, W], ...; y: [slots, O].  Grid: (.., S, slots).
    """
    part, slot = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < out_features
    if experts is not None:
        expert = tl.load(experts + slot)
        if expert < 0:
            return
        x += slot // TOP_K * x_stride
        groups = (row_words + GROUP_WORDS - 1) // GROUP_WORDS
        words += expert * out_features * row_words
        # Not in a function: Triton 3.6 has none that returns a None.
        if scales is not None:
            scales += expert * groups * ((out_features + GROUP_ROWS - 1) // GROUP_ROWS)
        if zeros is not None:
            zeros += expert * groups * out_features
        if row_scales is not None:
            row_scales += expert * out_features
        if bias is not None:
            bias += expert * out_features
    total = tl.zeros((BLOCK_O, BLOCK_W), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, row_words), BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        if EVEN:
            mask = row_mask[:, None]
            inside = tl.full((BLOCK_W,), True, tl.int1)
        else:
            inside = columns < row_words
            mask = row_mask[:, None] & inside[None, :]
        tile = tl.load(
            words + rows.to(tl.int64)[:, None] * row_words + columns[None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
        dot = tl.zeros((BLOCK_O, BLOCK_W), tl.float32)
        seen = tl.zeros((BLOCK_W,), tl.float32)
        for n in tl.static_range(N):
            value = tl.load(x + inputs + n * SPAN_WORDS, mask=inside, other=0.0).to(tl.float32)
            dot += DECODE(tile, n) * value[None, :]
            seen += value
        scale, zero = scales_and_zeros(
            scales,
            zeros,
            rows,
            columns,
            mask,
            out_features,
            GROUP_WORDS,
            GROUP_ROWS,
            OFFSET,
            ZERO,
            SCALE_KIND,
        )
        total += scale * (dot - zero * seen[None, :])
    result = tl.sum(total, axis=1)
    if row_scales is not None:
        result *= tl.load(row_scales + rows, mask=row_mask, other=0.0)
    if bias is not None:
        result += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    place = (part.to(tl.int64) * tl.num_programs(2) + slot) * out_features
    tl.store(y + place + rows, result.to(y.dtype.element_ty), mask=row_mask)


@kernel(varying=("slots", "block_experts", "tokens"))
def multiply_tile(
    x,
    words,
    scales,
    zeros,
    row_scales,
    bias,
    y,
    slots,
    block_experts,
    tokens,
    out_features,
    row_words,
    chunk,
    x_stride,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOP_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply a tile of rows by the weight, or a tile of slots by their expert's weight.

    x: [T, I].  y: [T, O], or [S, T, O] float32.  Grid: (O / BLOCK_O, T / BLOCK_T, S).
    With experts, T counts slots.  slots: [blocks * BLOCK_T] int32, those of each block's expert, T where there is none.
    block_experts: [blocks] int32, below 0 for blocks that are not needed.  x: [T / TOP_K, I].  words: [E, O, W].
    UPCAST: multiply in float32, for the interpreter, which has no bfloat16 arithmetic; values are rounded all the same.
    """
    part = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < out_features
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if block_experts is not None:
        expert = tl.load(block_experts + tl.program_id(1)).to(tl.int64)
        if expert < 0:
            return
        token = tl.load(slots + token)
        groups = (row_words + GROUP_WORDS - 1) // GROUP_WORDS
        words += expert * out_features * row_words
        # Not in a function: Triton 3.6 has none that returns a None.
        if scales is not None:
            scales += expert * groups * ((out_features + GROUP_ROWS - 1) // GROUP_ROWS)
        if zeros is not None:
            zeros += expert * groups * out_features
        if row_scales is not None:
            row_scales += expert * out_features
        if bias is not None:
            bias += expert * out_features
    token_mask = token < tokens
    x_rows = (token // TOP_K).to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, row_words), BLOCK_W):
        columns = start + tl.arange(0, BLOCK_W)
        if EVEN:
            mask = row_mask[:, None]
            x_mask = token_mask[None, :]
        else:
            inside = columns < row_words
            mask = row_mask[:, None] & inside[None, :]
            x_mask = token_mask[None, :] & inside[:, None]
        tile = tl.load(
            words + rows.to(tl.int64)[:, None] * row_words + columns[None, :],
            mask=mask,
            other=0,
            eviction_policy="evict_first",
        )
        scale, zero = scales_and_zeros(
            scales,
            zeros,
            rows,
            columns,
            mask,
            out_features,
            GROUP_WORDS,
            GROUP_ROWS,
            OFFSET,
            ZERO,
            SCALE_KIND,
        )
        inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
        for n in tl.static_range(N):
            values = tl.load(
                x + x_rows + (inputs + n * SPAN_WORDS)[:, None],
                mask=x_mask,
                other=0.0,
            )
            weight = ((DECODE(tile, n) - zero) * scale).to(x.dtype.element_ty)
            if UPCAST:
                weight, values = weight.to(tl.float32), values.to(tl.float32)
            total = tl.dot(weight, values, total)
    if row_scales is not None:
        total *= tl.load(row_scales + rows, mask=row_mask, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    places = (part.to(tl.int64) * tokens + token)[None, :] * out_features + rows[:, None]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])


@kernel(varying=("tokens",))
def add_splits(sums, row_scales, bias, y, tokens, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the splits of one token's outputs, in order.  sums: [S, T, O] float32.  y: [T, O].  Grid: (O / BLOCK, T)."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < out_features
    result = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        result += tl.load(sums + (part * tokens + token) * out_features + rows, mask=mask, other=0.0)
    if row_scales is not None:
        result *= tl.load(row_scales + rows, mask=mask, other=0.0)
    if bias is not None:
        result += tl.load(bias + rows, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + token * out_features + rows, result.to(y.dtype.element_ty), mask=mask)


@kernel(varying=("first", "count"))
def expand(
    words,
    scales,
    zeros,
    row_scales,
    dense,
    first,
    count,
    out_features,
    row_words,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN_WORDS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """Expand `count` rows of the weight, from row `first` on.

    dense: [count, I].  Grid: (count / BLOCK_O, W / BLOCK_W).
    """
    places = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    rows = first + places
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (places < count)[:, None] & (columns < row_words)[None, :]
    tile = tl.load(words + rows.to(tl.int64)[:, None] * row_words + columns[None, :], mask=mask, other=0)
    scale, zero = scales_and_zeros(
        scales, zeros, rows, columns, mask, out_features, GROUP_WORDS, GROUP_ROWS, OFFSET, ZERO, SCALE_KIND
    )
    if row_scales is not None:
        scale *= tl.load(row_scales + rows, mask=places < count, other=0.0)[:, None]
    inputs = (columns // SPAN_WORDS) * (SPAN_WORDS * N) + columns % SPAN_WORDS
    target = dense + places.to(tl.int64)[:, None] * (row_words * N) + inputs[None, :]
    for n in tl.static_range(N):
        value = (DECODE(tile, n) - zero) * scale
        tl.store(target + n * SPAN_WORDS, value.to(dense.dtype.element_ty), mask=mask)
