"""Products of weights of few bits with activations that are left as they are, on the GPU; see `weight_only.py`."""

# T tokens, O out_features, I in_features, W words a row, N codes a word, C words across threads, R runs of a span,
# S splits, E experts

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


@inline
def whole_steps(length, STEP: tl.constexpr):
    """Return a length, a multiple of STEP, so that the compiler knows it to be one: addresses then are, too.

    Of an argument Triton knows no more than whether it is a multiple of 16.
    """
    return length // STEP * STEP


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
def load_scale_and_zero(
    scales,
    zeros,
    group,
    rows,
    mask,
    out_features,
    GROUP_ROWS: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
):
    """Load the scales and the zero points of rows in a group, as float32.  group, rows and mask broadcast.

    Scales are 1 where there are none; zero points are ZERO where none are stored.
    """
    zero = tl.full(mask.shape, ZERO, tl.float32)
    if scales is None:
        scale = tl.full(mask.shape, 1.0, tl.float32)
    else:
        stride = (out_features + GROUP_ROWS - 1) // GROUP_ROWS
        stored = tl.load(scales + group * stride + rows // GROUP_ROWS, mask=mask, other=0)
        if SCALE_KIND == "float16 and zero":
            scale = stored.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            zero = (stored >> 16).to(tl.float32)
        elif SCALE_KIND == "bfloat16 and zero":
            scale = (stored << 16).to(tl.float32, bitcast=True)
            zero = (stored >> 16).to(tl.float32)
        else:
            scale = scale_value(stored, SCALE_KIND)
    if zeros is not None:
        zero = tl.load(zeros + group * out_features + rows, mask=mask, other=0).to(tl.float32)
    return scale, zero


@inline
def decode_words(
    words,
    zero,
    DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    STORED_ZERO: tl.constexpr,
):
    """Decode all codes of each word, less the zero point, to DTYPE, which holds them exactly.

    words: [O, C, R] int32.  zero: [O].  Returns N tensors [O, C, R], the low and the high code of each place.
    ASSEMBLY: see `pair_assembly.py`; "": DECODE says how.  STORED_ZERO: without, `zero` is what ADDED was made from.
    """
    values = ()
    zero = zero.to(tl.float32)
    if ASSEMBLY == "":
        zero = (zero + OFFSET)[:, None, None]
        for n in tl.static_range(N // 2):
            low = (DECODE(words, n) - zero).to(DTYPE)
            high = (DECODE(words, n + N // 2) - zero).to(DTYPE)
            values += (low, high)  # type: ignore[assignment]
    else:
        if STORED_ZERO:
            added = (BIAS - zero).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
            operands = [words, ((added & 0xFFFF) * 0x10001)[:, None, None]]
        else:
            operands = [words, ADDED]
        if N == 4:
            raw = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=h,=h,=h,=h,r,r",
                operands,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
        else:
            tl.static_assert(N == 8)
            raw = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=h,=h,=h,=h,=h,=h,=h,=h,r,r",
                operands,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
        for n in tl.static_range(N):
            values += (raw[n].to(DTYPE, bitcast=True),)  # type: ignore[assignment]
    return values


@inline
def take_runs(words, index: tl.constexpr, COUNT: tl.constexpr):
    """Take one of COUNT equal parts of the runs.  words: [O, C, R].  Returns [O, C, R / COUNT]."""
    for level in tl.static_range(3):
        if COUNT >> (level + 1) > 0:
            halves = words.reshape(words.shape[0], words.shape[1], 2, words.shape[2] // 2)
            first, second = tl.split(halves.permute(0, 1, 3, 2))
            if index // (COUNT >> (level + 1)) % 2 == 0:
                words = first
            else:
                words = second
    return words


@inline
def in_order(values, first: tl.constexpr, PAIRS: tl.constexpr, BESIDE: tl.constexpr):
    """Lay decoded codes out as inputs in order: PAIRS pairs of them, from pair `first` on.

    values: of `decode_words`, each [O, C, R].  Returns [O, R * PAIRS * C * 2].
    """
    pair: tl.constexpr = 2 * first
    if PAIRS == 1:
        joined = tl.join(values[pair], values[pair + 1])  # [O, C, R, half]
        laid = joined.permute(0, 2, 1, 3)
    elif PAIRS == 2:
        joined = tl.join(  # [O, C, R, half, n]
            tl.join(values[pair], values[pair + 1]), tl.join(values[pair + 2], values[pair + 3])
        )
        if BESIDE == 2:
            laid = joined.permute(0, 2, 4, 1, 3)
        else:
            laid = joined.permute(0, 2, 1, 4, 3)
    elif PAIRS == 4:
        even = tl.join(  # n = 0 and 2
            tl.join(values[pair], values[pair + 1]), tl.join(values[pair + 4], values[pair + 5])
        )
        odd = tl.join(
            tl.join(values[pair + 2], values[pair + 3]), tl.join(values[pair + 6], values[pair + 7])
        )
        joined = tl.join(even, odd)  # [O, C, R, half, n / 2, n % 2]
        if BESIDE == 2:
            laid = joined.permute(0, 2, 4, 5, 1, 3)
        else:
            laid = joined.permute(0, 2, 4, 1, 5, 3)
    else:
        tl.static_assert(PAIRS == 8)
        n0 = tl.join(tl.join(values[0], values[1]), tl.join(values[8], values[9]))
        n1 = tl.join(tl.join(values[2], values[3]), tl.join(values[10], values[11]))
        n2 = tl.join(tl.join(values[4], values[5]), tl.join(values[12], values[13]))
        n3 = tl.join(tl.join(values[6], values[7]), tl.join(values[14], values[15]))
        joined = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [O, C, R, half, n / 4, n / 2 % 2, n % 2]
        if BESIDE == 2:
            laid = joined.permute(0, 2, 4, 5, 6, 1, 3)
        else:
            laid = joined.permute(0, 2, 4, 5, 1, 6, 3)
    words = values[0]
    return laid.reshape(words.shape[0], words.shape[1] * words.shape[2] * PAIRS * 2)


@inline
def inputs_of_piece(
    words,
    zero,
    piece: tl.constexpr,
    DTYPE: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    BESIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    STORED_ZERO: tl.constexpr,
):
    """Decode one of the pieces of a span, the inputs in order.  words: [O, SPAN / N].  Returns [O, PIECE] DTYPE."""
    if N == 1:
        return words.to(DTYPE)
    else:
        ACROSS: tl.constexpr = 4 if SPAN // N >= 4 else SPAN // N
        IN_WORD: tl.constexpr = ACROSS * N // PIECE if ACROSS * N > PIECE else 1
        rows: tl.constexpr = words.shape[0]
        runs = words.reshape(rows, ACROSS, SPAN // N // ACROSS)
        part = take_runs(runs, piece // IN_WORD, SPAN // PIECE // IN_WORD)
        values = decode_words(part, zero, DTYPE, DECODE, N, OFFSET, ASSEMBLY, BIAS, ADDED, STORED_ZERO)
        PAIRS: tl.constexpr = N // 2 // IN_WORD
        return in_order(values, piece % IN_WORD * PAIRS, PAIRS, BESIDE)


@kernel(varying=("slots", "experts", "tokens"))
def multiply_tile(
    x,
    words,
    scales,
    zeros,
    row_scales,
    bias,
    y,
    slots,
    experts,
    tokens,
    out_features,
    row_words,
    chunk,
    x_stride,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    BESIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    FACTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOP_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Multiply a tile of rows by the weight, or a tile of slots by their expert's weight.

    x: [T, I].  y: [T, O], or [S, T, O] float32.  Grid: (O / BLOCK_O, T / BLOCK_T, S).
    With experts, T counts slots.  experts: [blocks], that of each block, below 0 for blocks that are not needed.
    slots: [blocks * BLOCK_T] int32, T where there is none; None: block i has slot i alone.
    x: [T / TOP_K, I].  words: [E, O, W].
    UPCAST: multiply in float32, for the interpreter, which has no bfloat16 arithmetic; values are exact all the same.
    """
    SPAN_WORDS: tl.constexpr = SPAN // N
    PIECES: tl.constexpr = SPAN // PIECE
    STORED_ZERO: tl.constexpr = (
        zeros is not None or SCALE_KIND == "float16 and zero" or SCALE_KIND == "bfloat16 and zero"
    )
    WHOLE: tl.constexpr = GROUP >= 1 << 30
    row_words, chunk = whole_steps(row_words, SPAN_WORDS), whole_steps(chunk, BLOCK_W)
    part = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < out_features
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    if experts is not None:
        expert = tl.load(experts + tl.program_id(1)).to(tl.int64)
        if expert < 0:
            return
        if slots is None:
            token = tl.where(tl.arange(0, BLOCK_T) == 0, tl.program_id(1), tokens)
        else:
            token = tl.load(slots + token)
        groups = (row_words * N + GROUP - 1) // GROUP
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
    if WHOLE:
        scale, zero = load_scale_and_zero(
            scales, zeros, 0, rows, row_mask, out_features, GROUP_ROWS, ZERO, SCALE_KIND
        )
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, row_words), BLOCK_W):
        for span in tl.static_range(BLOCK_W // SPAN_WORDS):
            first = start + span * SPAN_WORDS
            mask = row_mask
            x_mask = token_mask
            if not EVEN:
                mask = row_mask & (first < row_words)
                x_mask = token_mask & (first < row_words)
            columns = first + tl.arange(0, SPAN_WORDS)
            tile = tl.load(
                words + rows.to(tl.int64)[:, None] * row_words + columns[None, :],
                mask=mask[:, None],
                other=0,
                eviction_policy="evict_first",
            )
            for piece in tl.static_range(PIECES):
                inputs = first * N + piece * PIECE + tl.arange(0, PIECE)
                values = tl.load(x + x_rows + inputs[:, None], mask=x_mask[None, :], other=0.0)
                if not WHOLE:
                    group = (first * N + piece * PIECE) // GROUP
                    if not EVEN:
                        group = tl.where(first < row_words, group, 0)
                    scale, zero = load_scale_and_zero(
                        scales, zeros, group, rows, row_mask, out_features, GROUP_ROWS, ZERO, SCALE_KIND
                    )
                weight = inputs_of_piece(
                    tile,
                    zero,
                    piece,
                    x.dtype.element_ty,
                    DECODE,
                    N,
                    SPAN,
                    PIECE,
                    BESIDE,
                    OFFSET,
                    ASSEMBLY,
                    BIAS,
                    ADDED,
                    STORED_ZERO,
                )
                if UPCAST:
                    weight, values = weight.to(tl.float32), values.to(tl.float32)
                if WHOLE:
                    total = tl.dot(weight, values, total)
                else:
                    total += scale[:, None] * tl.dot(weight, values)
    if WHOLE:
        total *= scale[:, None]
    if row_scales is not None:
        total *= tl.load(row_scales + rows, mask=row_mask, other=0.0)[:, None]
    if FACTOR != 1.0:
        total *= FACTOR
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


@kernel(varying=("first_row", "count"))
def expand(
    words,
    scales,
    zeros,
    row_scales,
    dense,
    first_row,
    count,
    out_features,
    row_words,
    BLOCK_O: tl.constexpr,
    DECODE: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    BESIDE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    BIAS: tl.constexpr,
    ADDED: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Expand a span of `count` rows of the weight, from row `first_row` on.

    dense: [count, I].  Grid: (count / BLOCK_O, spans of a row).
    """
    STORED_ZERO: tl.constexpr = (
        zeros is not None or SCALE_KIND == "float16 and zero" or SCALE_KIND == "bfloat16 and zero"
    )
    SPAN_WORDS: tl.constexpr = SPAN // N
    row_words = whole_steps(row_words, SPAN_WORDS)
    places = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = places < count
    rows = first_row + places
    first = tl.program_id(1) * SPAN_WORDS
    columns = first + tl.arange(0, SPAN_WORDS)
    tile = tl.load(
        words + rows.to(tl.int64)[:, None] * row_words + columns[None, :], mask=mask[:, None], other=0
    )
    for piece in tl.static_range(SPAN // PIECE):
        inputs = first * N + piece * PIECE + tl.arange(0, PIECE)
        group = (first * N + piece * PIECE) // GROUP
        scale, zero = load_scale_and_zero(
            scales, zeros, group, rows, mask, out_features, GROUP_ROWS, ZERO, SCALE_KIND
        )
        scale *= FACTOR
        if row_scales is not None:
            scale *= tl.load(row_scales + rows, mask=mask, other=0.0)
        weight = inputs_of_piece(
            tile,
            zero,
            piece,
            dense.dtype.element_ty,
            DECODE,
            N,
            SPAN,
            PIECE,
            BESIDE,
            OFFSET,
            ASSEMBLY,
            BIAS,
            ADDED,
            STORED_ZERO,
        )
        value = weight.to(tl.float32) * scale[:, None]
        target = dense + places.to(tl.int64)[:, None] * (row_words * N) + inputs[None, :]
        tl.store(target, value.to(dense.dtype.element_ty), mask=mask[:, None])
