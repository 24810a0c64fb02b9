"""Attention over paged keys and values on the GPU; see `attention.py`."""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, S splits

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel
from pymllm.kernels.triton.weight_only_kernels import e4m3_value, whole_steps

if TYPE_CHECKING:
    import triton.language as tl


@inline
def stored_value(stored, dtype: tl.constexpr, CODES: tl.constexpr):
    """Convert stored keys or values to the dtype of products, in which 8-bit codes are exact.

    CODES: "fp8", which comes as bytes, "int8" or "".
    """
    if CODES == "fp8":
        value = e4m3_value(stored.to(tl.int32)).to(dtype)
    elif CODES == "int8":
        value = stored.to(tl.float32).to(dtype)
    else:
        value = stored.to(dtype)
    return value


@inline
def e4m3_pairs(pairs):
    """Move the fields of two e4m3 codes, in the upper bytes of a word's halves, to those of two float16 values.

    Values are 2^-8 of what the codes mean, as exponents of float16 have another bias. A NaN stays one: the sum reaches
    the highest bit of the exponent for its code alone.
    """
    size = (pairs >> 1) & 0x3F803F80
    return (pairs & 0x80008000) | size | ((size + 0x00800080) & 0x40004000)


@inline
def halves_of(pairs):
    """Return the lower and the upper halves of words as float16, side by side: [N, W, 2]."""
    lower = pairs.to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(lower, (pairs >> 16).to(tl.uint16).to(tl.float16, bitcast=True))


@inline
def word_values(words, CODES: tl.constexpr):
    """Return the codes of words [N, W], as float16 [N, 4 W].

    CODES: "ptx" or "converted", fp8 that the GPU converts; "fp8", which comes as 2^-8 of its value; "normal", fp8 as it
    is, of which none is subnormal in float16; or "int8": of these three the second and the third of every four change
    places.
    """
    words = words.to(tl.uint32, bitcast=True)
    rows: tl.constexpr = words.shape[0]
    columns: tl.constexpr = 4 * words.shape[1]
    if CODES == "ptx":
        first, second = tl.inline_asm_elementwise(
            """{ .reg .b16 first, second;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
        values = tl.reshape(
            tl.permute(tl.join(halves_of(first), halves_of(second)), (0, 1, 3, 2)), (rows, columns)
        )
    elif CODES == "converted":
        even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
        odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
        codes = tl.reshape(tl.join(even, odd), (rows, columns))
        values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif CODES == "fp8" or CODES == "normal":
        even, odd = halves_of(e4m3_pairs(words << 8)), halves_of(e4m3_pairs(words))
        values = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 2)), (rows, columns))
        if CODES == "normal":
            values *= 256.0
    else:
        # 0x6400 + n is 1024 + n in float16; n, a code whose sign bit is turned, is 128 above it.
        even = halves_of((words & 0x00FF00FF) ^ 0x64806480)
        odd = halves_of(((words >> 8) & 0x00FF00FF) ^ 0x64806480)
        values = tl.reshape(tl.permute(tl.join(even, odd), (0, 1, 3, 2)), (rows, columns)) - 1152.0
    return values


@inline
def in_order(columns, CODES: tl.constexpr, WORDS: tl.constexpr):
    """Return the elements that columns of loaded keys or values hold."""
    if WORDS and (CODES == "fp8" or CODES == "normal" or CODES == "int8"):
        columns = (columns & -4) | ((columns & 1) << 1) | ((columns >> 1) & 1)
    return columns


@inline
def product(a, b, UPCAST: tl.constexpr):
    """Multiply matrices of 16-bit floats, with sums in float32.  UPCAST: in the interpreter, which rounds sums."""
    if UPCAST:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        result = tl.dot(a, b)
    return result


@inline
def as_float16(queries):
    """Scale each row by a power of two to below 2^15, and round it to float16.  Returns what undoes it, too.

    Of a bfloat16 row nothing is lost that lies within 2^29 of its largest element.
    """
    peak = tl.max(tl.abs(queries.to(tl.float32)), axis=1)
    exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 15), 254)
    unit = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return (queries.to(tl.float32) * up[:, None]).to(tl.float16), unit


@kernel(varying=("query_starts", "lengths", "pages", "status", "holes", "hole_ends", "page_stride", "tokens"))
def attend(
    q,
    k,
    v,
    k_scale,
    v_scale,
    sinks,
    y,
    partial_max,
    partial_sum,
    query_starts,
    lengths,
    pages,
    status,
    holes,
    hole_ends,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    page_stride,
    tokens,
    block_size,
    scale,
    soft_cap,
    num_heads,
    num_kv_heads,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALING: tl.constexpr,
    CODES: tl.constexpr,
    WORDS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PREFIX_CAUSAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend for one block of a request's new tokens, for GROUP of the SHARED heads that share a key head.

    q: [T, H, D].  k, v: flattened pages [slots, Hkv, D], or with PAGE 0 this step's own, [T, Hkv, D].
    CODES: what k and v hold, "" for floats; with WORDS they come as int32 words of four codes: see `word_values`.
    STEP: what all strides of k and v are multiples of.
    y: [T, H, Dv]; with SPLITS above 1: [S, T, H, Dv] float32, beside partial_max and partial_sum [S, T, H].
    Grid: (R, new tokens / BLOCK_T, H / GROUP · S).
    """
    LATE_SUMS: tl.constexpr = BLOCK_T * BLOCK_G < 64
    k_stride, k_head_stride = whole_steps(k_stride, STEP), whole_steps(k_head_stride, STEP)
    v_stride, v_head_stride = whole_steps(v_stride, STEP), whole_steps(v_head_stride, STEP)
    request, block = tl.program_id(0), tl.program_id(1)
    part, head_block = tl.program_id(2) % SPLITS, tl.program_id(2) // SPLITS
    first = tl.load(query_starts + request)
    new = tl.load(query_starts + request + 1) - first
    if block * BLOCK_T >= new:
        return
    length = tl.load(lengths + request)
    cached = length - new
    lanes = tl.arange(0, BLOCK_T * BLOCK_G)
    token, member = block * BLOCK_T + lanes // BLOCK_G, lanes % BLOCK_G
    head = head_block * GROUP + member
    row_mask = (token < new) & (member < GROUP)
    kv_head = (head_block * GROUP) // SHARED
    position = cached + token
    dims, value_dims = (
        in_order(tl.arange(0, BLOCK_D), CODES, WORDS),
        in_order(tl.arange(0, BLOCK_DV), CODES, WORDS),
    )
    queries = tl.load(
        q + (first + token).to(tl.int64)[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
        mask=row_mask[:, None] & (dims < D)[None, :],
        other=0.0,
    )
    row_scale = scale * 1.4426950408889634  # log2(e)
    if WORDS:
        words, value_words = tl.arange(0, BLOCK_D // 4), tl.arange(0, BLOCK_DV // 4)
        if q.dtype.element_ty != tl.float16:
            queries, unit = as_float16(queries)
            row_scale *= unit[:, None]
    # Where the keys that the last token sees end; a strategy may let it see to the end of its own block of tokens.
    stop = cached + tl.minimum((block + 1) * BLOCK_T, new)
    causal = True
    if BLOCKS:
        causal = False
        if PREFIX_CAUSAL:
            causal = tl.load(status + request) == 0 if status is not None else True
        stop = tl.where(causal, stop, tl.minimum(((stop - 1) // block_size + 1) * block_size, length))
    start = 0
    if WINDOW > 0:
        start = tl.maximum(cached + block * BLOCK_T - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        share = ((stop - start + SPLITS - 1) // SPLITS + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        start, stop = start + part * share, tl.minimum(start + (part + 1) * share, stop)

    most = tl.full((BLOCK_T * BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T * BLOCK_G,), tl.float32)
    # Weights and their total are 2^15 times softmax's: few are then subnormal in float16, which some matrix units take
    # for 0. The first split counts the sinks.
    if sinks is not None:
        sink = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        most = tl.where(part == 0, sink, most)
        total = tl.where(part == 0, 32768.0, total)
    if SCALING == "static":
        row_scale *= tl.load(k_scale + kv_head)
    if WORDS and CODES == "fp8":
        row_scale *= 256.0
    result = tl.zeros((BLOCK_T * BLOCK_G, BLOCK_DV), tl.float32)
    # Where warps divide the keys, a sum over them costs two barriers: few rows keep it for each key until the end.
    if LATE_SUMS:
        total = tl.where((tl.arange(0, BLOCK_N) == 0)[None, :], total[:, None], 0.0)
    largest_scale = 1.1754943508222875e-38
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        inside = key < stop
        held = tl.minimum(key, stop - 1)  # what is loaded for keys that are not there has no weight
        if PAGE > 0:
            page = tl.load(pages + request * page_stride + held // PAGE)
            slot = page.to(tl.int64) * PAGE + held % PAGE
        else:
            slot = (first + held).to(tl.int64)
        key_at, value_at = (
            slot * k_stride + kv_head * k_head_stride,
            slot * v_stride + kv_head * v_head_stride,
        )
        if WORDS:
            codes = tl.load(k + key_at[:, None] + words[None, :], mask=(words < D // 4)[None, :], other=0)
            keys = tl.trans(word_values(codes, CODES))
        else:
            keys = tl.load(k + key_at[None, :] + dims[:, None], mask=(dims < D)[:, None], other=0.0)
            keys = stored_value(keys, q.dtype.element_ty, CODES)
        scores = product(queries, keys, UPCAST)
        scores *= row_scale
        if SCALING == "token":
            scores *= tl.load(k_scale + slot * num_kv_heads + kv_head)[None, :]
        # tanh, from an exponential whose overflow gives 1 and whose underflow gives -1, as it should.
        if CAPPED:
            limit = soft_cap * 1.4426950408889634
            scores = limit * (1.0 - 2.0 / (tl.exp2(scores * (2.0 / soft_cap)) + 1.0))
        seen = key[None, :] <= position[:, None]
        if BLOCKS:
            seen |= (not causal) & (key[None, :] < ((position // block_size + 1) * block_size)[:, None])
            if holes is not None:
                hole = (key >= tl.load(holes + request)) & (key < tl.load(hole_ends + request))
                seen &= (~(hole & (key < cached)))[None, :]
        if WINDOW > 0:
            seen &= key[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen & inside[None, :] & row_mask[:, None], scores, float("-inf"))
        above = tl.maximum(most, tl.max(scores, axis=1))
        known = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(scores - (known - 15.0)[:, None])
        fade = tl.exp2(most - known)
        if LATE_SUMS:
            total = total * fade[:, None] + weights
        else:
            total = total * fade + tl.sum(weights, axis=1)
        most = above
        if SCALING == "token":
            # Scales are made 1 or less, as those of all tokens need not fit the range of a 16-bit float.
            scales = tl.load(v_scale + slot * num_kv_heads + kv_head)
            larger_scale = tl.maximum(largest_scale, tl.max(scales, axis=0))
            weights *= (scales / larger_scale)[None, :]
            fade *= largest_scale / larger_scale
            largest_scale = larger_scale
        if WORDS:
            codes = tl.load(
                v + value_at[:, None] + value_words[None, :], mask=(value_words < DV // 4)[None, :], other=0
            )
            values = word_values(codes, CODES)
        else:
            values = tl.load(
                v + value_at[:, None] + value_dims[None, :], mask=(value_dims < DV)[None, :], other=0.0
            )
            values = stored_value(values, q.dtype.element_ty, CODES)
        if UPCAST:
            result = result * fade[:, None] + product(weights, values, UPCAST)
        else:
            result = tl.dot(weights.to(values.dtype), values, result * fade[:, None])
    if LATE_SUMS:
        total = tl.sum(total, axis=1)
    if SCALING == "static":
        result *= tl.load(v_scale + kv_head)
    elif SCALING == "token":
        result *= largest_scale
    if WORDS and CODES == "fp8":
        result *= 256.0
    row = (first + token).to(tl.int64) * num_heads + head
    mask = row_mask[:, None] & (value_dims < DV)[None, :]
    if SPLITS > 1:
        row += part.to(tl.int64) * tokens * num_heads
        tl.store(partial_max + row, most, mask=row_mask)
        tl.store(partial_sum + row, total, mask=row_mask)
        mask &= (start < stop) | (part == 0)  # of a part without keys, `join_splits` reads no more than that
        tl.store(y + row[:, None] * DV + value_dims[None, :], result, mask=mask)
    else:
        result /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(y + row[:, None] * DV + value_dims[None, :], result.to(y.dtype.element_ty), mask=mask)


@kernel(varying=("rows",))
def join_splits(
    parts, partial_max, partial_sum, y, rows, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Join the splits of one row.

    parts: [S, T·H, Dv], partial_max, partial_sum: [S, T·H] float32.  y: [T·H, Dv].  Grid: (T·H,).
    """
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_DV)
    splits = tl.arange(0, SPLITS)
    most = tl.load(partial_max + splits * rows + row)
    above = tl.max(most, axis=0)
    fade = tl.exp2(most - tl.where(above == float("-inf"), 0.0, above))
    total = tl.sum(tl.load(partial_sum + splits * rows + row) * fade, axis=0)
    values = tl.load(
        parts + (splits * rows + row)[:, None] * DV + dims[None, :],
        mask=(most != float("-inf"))[:, None] & (dims < DV)[None, :],
        other=0.0,
    )
    result = tl.sum(values * fade[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * DV + dims, result.to(y.dtype.element_ty), mask=dims < DV)
