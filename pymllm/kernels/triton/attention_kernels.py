"""Attention over paged keys and values on the GPU, and storing them; see `attention.py`."""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, S splits

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.eight_bit_kernels import round_half_even, to_e4m3
from pymllm.kernels.triton.launch import inline, kernel
from pymllm.kernels.triton.weight_only_kernels import e4m3_value

if TYPE_CHECKING:
    import triton.language as tl


@inline
def stored_value(stored, dtype: tl.constexpr, BYTES: tl.constexpr):
    """Convert stored keys or values to the activations' dtype, in which 8-bit codes are exact.

    BYTES: fp8 comes as its bytes.
    """
    if BYTES:
        value = e4m3_value(stored.to(tl.int32)).to(dtype)
    elif stored.dtype == tl.int8:
        value = stored.to(tl.float32).to(dtype)
    else:
        value = stored.to(dtype)
    return value


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
    BYTES: tl.constexpr,
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
    y: [T, H, Dv]; with SPLITS above 1: [S, T, H, Dv] float32, beside partial_max and partial_sum [S, T, H].
    Grid: (R, new tokens / BLOCK_T, H / GROUP · S).
    """
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
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dtype = q.dtype.element_ty
    queries = tl.load(
        q + (first + token).to(tl.int64)[:, None] * q_stride + head[:, None] * q_head_stride + dims[None, :],
        mask=row_mask[:, None] & (dims < D)[None, :],
        other=0.0,
    )
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
    # The first split counts the sinks.
    if sinks is not None:
        sink = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32) * 1.4426950408889634
        most = tl.where(part == 0, sink, most)
        total = tl.where(part == 0, 1.0, total)
    result = tl.zeros((BLOCK_T * BLOCK_G, BLOCK_DV), tl.float32)
    if SCALING == "static":
        key_scale, value_scale = tl.load(k_scale + kv_head), tl.load(v_scale + kv_head)
    for at in range(start, stop, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        inside = key < stop
        if PAGE > 0:
            page = tl.load(pages + request * page_stride + key // PAGE, mask=inside, other=0)
            slot = page.to(tl.int64) * PAGE + key % PAGE
        else:
            slot = (first + key).to(tl.int64)
        keys = tl.load(
            k + slot[None, :] * k_stride + kv_head * k_head_stride + dims[:, None],
            mask=inside[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        keys = stored_value(keys, dtype, BYTES)
        if UPCAST:
            scores = tl.dot(queries.to(tl.float32), keys.to(tl.float32)) * scale
        else:
            scores = tl.dot(queries, keys) * scale
        if SCALING == "static":
            scores *= key_scale
        elif SCALING == "token":
            scores *= tl.load(k_scale + slot * num_kv_heads + kv_head, mask=inside, other=0.0)[None, :]
        # tanh, from an exponential whose overflow gives 1 and whose underflow gives -1, as it should.
        if CAPPED:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / soft_cap)) + 1.0))
        scores *= 1.4426950408889634  # log2(e)
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
        weights = tl.exp2(scores - known[:, None])
        fade = tl.exp2(most - known)
        total = total * fade + tl.sum(weights, axis=1)
        most = above
        values = tl.load(
            v + slot[:, None] * v_stride + kv_head * v_head_stride + value_dims[None, :],
            mask=inside[:, None] & (value_dims < DV)[None, :],
            other=0.0,
        )
        values = stored_value(values, dtype, BYTES)
        if SCALING == "token":
            weights *= tl.load(v_scale + slot * num_kv_heads + kv_head, mask=inside, other=0.0)[None, :]
        if UPCAST:
            result = result * fade[:, None] + tl.dot(weights, values.to(tl.float32))
        else:
            result = tl.dot(weights.to(dtype), values, result * fade[:, None])
    if SCALING == "static":
        result *= value_scale
    row = (first + token).to(tl.int64) * num_heads + head
    mask = row_mask[:, None] & (value_dims < DV)[None, :]
    if SPLITS > 1:
        row += part.to(tl.int64) * tokens * num_heads
        tl.store(partial_max + row, most, mask=row_mask)
        tl.store(partial_sum + row, total, mask=row_mask)
        tl.store(y + row[:, None] * DV + value_dims[None, :], result, mask=mask)
    else:
        result /= tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(y + row[:, None] * DV + value_dims[None, :], result.to(dtype), mask=mask)


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
        parts + (splits * rows + row)[:, None] * DV + dims[None, :], mask=(dims < DV)[None, :], other=0.0
    )
    result = tl.sum(values * fade[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y + row * DV + dims, result.to(y.dtype.element_ty), mask=dims < DV)


@kernel(varying=("slots",))
def store(
    new,
    pages,
    scales,
    slots,
    stride,
    head_stride,
    num_kv_heads,
    D: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALING: tl.constexpr,
    INTEGER: tl.constexpr,
    BYTES: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store one head of a new key or value, scaled and rounded as the cache's type asks, in its token's slot.

    new: [T, Hkv, D].  slots: [T], below 0: the token is skipped.  pages: [slots, Hkv, D].
    scales: [Hkv], given (SCALING "static"), or [slots, Hkv], written here ("token").  Grid: (T, Hkv).
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    values = tl.load(new + token * stride + head * head_stride + dims, mask=mask, other=0.0).to(tl.float32)
    place = slot * num_kv_heads + head
    if SCALING == "token":
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), LARGEST), 1.1754943508222875e-38)
        tl.store(scales + place, scale)
    elif SCALING == "static":
        scale = tl.load(scales + head)
    if SCALING != "none":
        values = tl.div_rn(values, tl.full((BLOCK_D,), 1.0, tl.float32) * scale)
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    if INTEGER:
        tl.store(pages + place * D + dims, round_half_even(values).to(tl.int8), mask=mask)
    elif BYTES:
        tl.store(pages + place * D + dims, to_e4m3(values, HARDWARE), mask=mask)
    else:
        tl.store(pages + place * D + dims, values.to(pages.dtype.element_ty), mask=mask)
