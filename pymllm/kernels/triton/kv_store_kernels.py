"""Storing keys and values in a cache's pages on the GPU, and rotating queries and keys before; see `kv_store.py`."""

# T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size, R rotary size

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.eight_bit_kernels import round_half_even, to_e4m3
from pymllm.kernels.triton.elementwise_kernels import rotated_halves
from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


@inline
def scales_of(scales, place, heads, head_mask, peak, SCALING: tl.constexpr, LARGEST: tl.constexpr):
    """Return the scale of each head: given, [Hkv] ("static"), or by its largest element, and written ("token")."""
    if SCALING == "token":
        scale = tl.maximum(tl.div_rn(peak, tl.full(peak.shape, LARGEST, tl.float32)), 1.1754943508222875e-38)
        tl.store(scales + place, scale, mask=head_mask)
    elif SCALING == "static":
        scale = tl.load(scales + heads, mask=head_mask, other=1.0)
    else:
        scale = peak
    return scale


@inline
def put(
    at,
    values,
    scale,
    mask,
    SCALING: tl.constexpr,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    BYTES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Write values of heads, float32, in the pages' type.  at, values: [heads, elements].  scale: of each head."""
    if SCALING != "none":
        values = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
    if INTEGER:
        tl.store(at, round_half_even(values).to(tl.int8), mask=mask)
    elif BYTES:
        tl.store(at, to_e4m3(values, HARDWARE), mask=mask)
    else:
        tl.store(at, values.to(at.dtype.element_ty), mask=mask)


@inline
def keep(
    new,
    pages,
    scales,
    place,
    heads,
    head_mask,
    head_stride,
    SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALING: tl.constexpr,
    INTEGER: tl.constexpr,
    BYTES: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store some heads of a token as they are.  new: at the token's first head.  place: of each head in the pages."""
    lanes = tl.arange(0, BLOCK)
    mask = head_mask[:, None] & (lanes < SIZE)[None, :]
    values = tl.load(new + heads[:, None] * head_stride + lanes[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = scales_of(scales, place, heads, head_mask, tl.max(tl.abs(values), axis=1), SCALING, LARGEST)
    at = pages + place[:, None] * SIZE + lanes[None, :]
    put(at, values, scale, mask, SCALING, LARGEST, INTEGER, BYTES, HARDWARE)


@kernel(varying=("slots",))
def store_tokens(
    k,
    v,
    q,
    y,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    slots,
    cos,
    sin,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    HALF: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALING: tl.constexpr,
    INTEGER: tl.constexpr,
    BYTES: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Store heads of a new key or value, scaled and rounded as the cache's type asks, in their token's slot.

    With HALF, half of R, above 0, keys are rotated before, and so are queries.
    q, y: [T, H, D], HEADS is 0 without them.  k: [T, Hkv, D].  v: [T, Hkv, Dv].  k_pages, v_pages: [slots, Hkv, size].
    slots: [T], below 0: keys and values of the token are skipped.  cos, sin: [T, HALF].
    k_scales, v_scales: [Hkv], given (SCALING "static"), or [slots, Hkv], written here ("token").
    Grid: (T, blocks of heads: of queries, keys and values).
    """
    QUERIES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KEYS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lanes = tl.arange(0, BLOCK_R)
    if HEADS > 0:
        if part < QUERIES:
            q_heads = part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            q_mask = q_heads < HEADS
            source = q + token * q_stride + q_heads * q_head_stride + lanes[None, :]
            one, other, after = rotated_halves(source, cos, sin, token, lanes, q_mask, D, HALF)
            target = y + (token * HEADS + q_heads) * D + lanes[None, :]
            tl.store(target, one, mask=q_mask & (lanes < HALF)[None, :])
            tl.store(target + HALF, other, mask=q_mask & (lanes < HALF)[None, :])
            if D > 2 * HALF:
                tl.store(target + 2 * HALF, after, mask=q_mask & (lanes < D - 2 * HALF)[None, :])
            return
        part -= QUERIES
    heads = part % KEYS * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(slots + token).to(tl.int64)
    head_mask = (heads < KV_HEADS) & (slot >= 0)
    place = slot * KV_HEADS + heads
    if part >= KEYS:
        keep(
            v + token * v_stride,
            v_pages,
            v_scales,
            place,
            heads,
            head_mask,
            v_head_stride,
            DV,
            LARGEST,
            SCALING,
            INTEGER,
            BYTES,
            HARDWARE,
            BLOCK_DV,
        )
    elif HALF == 0:
        keep(
            k + token * k_stride,
            k_pages,
            k_scales,
            place,
            heads,
            head_mask,
            k_head_stride,
            D,
            LARGEST,
            SCALING,
            INTEGER,
            BYTES,
            HARDWARE,
            BLOCK_D,
        )
    else:
        source = k + token * k_stride + heads[:, None] * k_head_stride + lanes[None, :]
        first, second, rest = rotated_halves(source, cos, sin, token, lanes, head_mask[:, None], D, HALF)
        first, second = first.to(tl.float32), second.to(tl.float32)
        peak = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), axis=1)
        if D > 2 * HALF:
            rest = rest.to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(rest), axis=1))
        scale = scales_of(k_scales, place, heads, head_mask, peak, SCALING, LARGEST)
        at = k_pages + place[:, None] * D + lanes[None, :]
        mask = head_mask[:, None] & (lanes < HALF)[None, :]
        put(at, first, scale, mask, SCALING, LARGEST, INTEGER, BYTES, HARDWARE)
        put(at + HALF, second, scale, mask, SCALING, LARGEST, INTEGER, BYTES, HARDWARE)
        if D > 2 * HALF:
            mask = head_mask[:, None] & (lanes < D - 2 * HALF)[None, :]
            put(at + 2 * HALF, rest, scale, mask, SCALING, LARGEST, INTEGER, BYTES, HARDWARE)
