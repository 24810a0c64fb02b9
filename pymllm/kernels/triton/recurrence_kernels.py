"""The gated delta rule, the scan of Mamba 2 and causal convolutions on the GPU; see `recurrence.py`.

starts, lengths, slots: where each request's new tokens start, [R + 1], its length after the step, [R], and its state's
slot, [R] (below 0, or without slots: it begins with zeros, and nothing is kept).
"""

# R requests, T tokens of this step, S slots, Hk key heads, Hv value heads, Dk key size, Dv value size,
# H heads, P head size, G groups, N state size, C channels, K kernel size

from __future__ import annotations

from typing import TYPE_CHECKING

from pymllm.kernels.triton.launch import inline, kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel(varying=("starts", "lengths", "slots"))
def delta_rule(
    q,
    k,
    v,
    g,
    beta,
    y,
    state,
    starts,
    lengths,
    slots,
    q_stride,
    k_stride,
    v_stride,
    g_stride,
    beta_stride,
    scale,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    NORMALISE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Run the rule over a request's tokens, for some columns of one value head's state, which stays in registers.

    q, k: [T, Hk, Dk].  v, y: [T, Hv, Dv].  g, beta: [T, Hv]; with CHANNELS g is [T, Hv, Dk].  state: [S, Hv, Dk, Dv].
    GROUP: value heads of a key head.
    Grid: (R, Hv, Dv / BLOCK_V).
    """
    request, head = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(starts + request), tl.load(starts + request + 1)
    if first >= stop:
        return
    keys, columns = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_mask, column_mask = keys < DK, columns < DV
    mask = key_mask[:, None] & column_mask[None, :]
    matrix = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if slots is not None:
        slot = tl.load(slots + request)
        mask &= slot >= 0
        place = state + ((slot * HEADS + head) * DK + keys[:, None]) * DV + columns[None, :]
        continued = tl.load(lengths + request) > stop - first
        matrix = tl.load(place, mask=mask & continued, other=0.0)
    token = first.to(tl.int64)
    query_at = q + token * q_stride + head // GROUP * DK + keys
    key_at = k + token * k_stride + head // GROUP * DK + keys
    value_at = v + token * v_stride + head * DV + columns
    result_at = y + (token * HEADS + head) * DV + columns
    beta_at = beta + token * beta_stride + head
    decay_at = g + token * g_stride + (head * DK + keys[:, None] if CHANNELS else head)
    for _ in range(first, stop):
        query = tl.load(query_at, mask=key_mask, other=0.0).to(tl.float32)
        key = tl.load(key_at, mask=key_mask, other=0.0).to(tl.float32)
        value = tl.load(value_at, mask=column_mask, other=0.0).to(tl.float32)
        if NORMALISE:
            query /= tl.sqrt_rn(tl.sum(query * query, axis=0) + eps)
            key /= tl.sqrt_rn(tl.sum(key * key, axis=0) + eps)
        if CHANNELS:
            matrix *= tl.exp(tl.load(decay_at, mask=key_mask[:, None], other=0.0).to(tl.float32))
        else:
            matrix *= tl.exp(tl.load(decay_at).to(tl.float32))
        change = value - tl.sum(matrix * key[:, None], axis=0)
        change *= tl.load(beta_at).to(tl.float32)
        matrix += key[:, None] * change[None, :]
        result = tl.sum(matrix * (query * scale)[:, None], axis=0)
        tl.store(result_at, result.to(y.dtype.element_ty), mask=column_mask)
        query_at += q_stride
        key_at += k_stride
        value_at += v_stride
        result_at += HEADS * DV
        decay_at += g_stride
        beta_at += beta_stride
    if slots is not None:
        tl.store(place, matrix, mask=mask)


@inline
def softplus(x):
    """Compute log(1 + exp(x)) to float32's precision: near 1 the logarithm of a GPU has but an absolute one."""
    power = tl.exp(tl.minimum(x, 20.0))
    ratio = power / (2.0 + power)
    square = ratio * ratio
    series = 1.0 / 11.0 + square * (1.0 / 13.0)
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * series))
    small = 2.0 * ratio * series
    return tl.where(x > 20.0, x, tl.where(power < 0.5, small, tl.log(1.0 + power)))


@kernel(varying=("starts", "lengths", "slots"))
def scan_tokens(
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    y,
    state,
    starts,
    lengths,
    slots,
    x_stride,
    dt_stride,
    b_stride,
    c_stride,
    least_dt,
    most_dt,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scan a request's tokens, for some rows of one head's state, which stays in registers.

    x, y: [T, H, P].  dt: [T, H].  b, c: [T, G, N].  a, d, dt_bias: [H].  state: [S, H, P, N].  SHARED: heads a group.
    Grid: (R, H, P / BLOCK_P).
    """
    request, head = tl.program_id(0), tl.program_id(1)
    first, stop = tl.load(starts + request), tl.load(starts + request + 1)
    if first >= stop:
        return
    rows, columns = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < P, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    matrix = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if slots is not None:
        slot = tl.load(slots + request)
        mask &= slot >= 0
        place = state + ((slot * HEADS + head) * P + rows[:, None]) * N + columns[None, :]
        continued = tl.load(lengths + request) > stop - first
        matrix = tl.load(place, mask=mask & continued, other=0.0)
    rate, skip = tl.load(a + head).to(tl.float32), tl.load(d + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)
    token = first.to(tl.int64)
    input_at = x + token * x_stride + head * P + rows
    result_at = y + (token * HEADS + head) * P + rows
    step_at = dt + token * dt_stride + head
    b_at = b + token * b_stride + head // SHARED * N + columns
    c_at = c + token * c_stride + head // SHARED * N + columns
    for _ in range(first, stop):
        values = tl.load(input_at, mask=row_mask, other=0.0).to(tl.float32)
        step = softplus(tl.load(step_at).to(tl.float32) + bias)
        step = tl.where(step < least_dt, least_dt, tl.where(step > most_dt, most_dt, step))
        to_state = tl.load(b_at, mask=column_mask, other=0.0).to(tl.float32)
        from_state = tl.load(c_at, mask=column_mask, other=0.0).to(tl.float32)
        matrix = matrix * tl.exp(step * rate) + (step * values)[:, None] * to_state[None, :]
        result = tl.sum(matrix * from_state[None, :], axis=1) + skip * values
        tl.store(result_at, result.to(y.dtype.element_ty), mask=row_mask)
        input_at += x_stride
        result_at += HEADS * P
        step_at += dt_stride
        b_at += b_stride
        c_at += c_stride
    if slots is not None:
        tl.store(place, matrix, mask=mask)


@inline
def inputs_at(
    x, state, slot, first, position, channels, mask, continued, x_stride, C: tl.constexpr, PAST: tl.constexpr
):
    """Load inputs of channels as float32, from before the step's first token too.

    position: 0 is the request's first new token.  slot, continued: of its state, [S, C, PAST], or not continued: zeros.
    """
    new = tl.load(
        x + (first + position).to(tl.int64) * x_stride + channels, mask=mask & (position >= 0), other=0.0
    )
    found = new.to(tl.float32)
    if state is not None:
        before = mask & (position < 0) & (position >= -PAST) & continued
        found += tl.load(state + (slot * C + channels) * PAST + PAST + position, mask=before, other=0.0)
    return found


@kernel(varying=("starts", "lengths", "slots"))
def convolve(
    x,
    weight,
    bias,
    y,
    state,
    starts,
    lengths,
    slots,
    x_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Run the convolution over a block of a request's tokens and channels; the state stays as it is.

    x, y: [T, C].  weight: [C, K].  bias: [C].  state: [S, C, K - 1].  Grid: (R, new tokens / BLOCK_T, C / BLOCK_C).
    """
    request = tl.program_id(0)
    first = tl.load(starts + request)
    new = tl.load(starts + request + 1) - first
    if tl.program_id(1) * BLOCK_T >= new:
        return
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (tokens < new) & (channels < C)
    slot = first.to(tl.int64)
    continued = new < 0
    if slots is not None:
        slot = tl.load(slots + request)
        continued = (tl.load(lengths + request) > new) & (slot >= 0)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if bias is not None:
        total += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)
    for at in tl.static_range(K):
        factor = tl.load(weight + channels * K + at, mask=channels < C, other=0.0).to(tl.float32)
        position = tokens - (K - 1) + at
        total += factor * inputs_at(
            x, state, slot, first, position, channels, mask, continued, x_stride, C, K - 1
        )
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + (first + tokens).to(tl.int64) * C + channels, total.to(y.dtype.element_ty), mask=mask)


@kernel(varying=("starts", "lengths", "slots"))
def keep_inputs(
    x,
    state,
    starts,
    lengths,
    slots,
    x_stride,
    C: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Put a request's last PAST inputs into its state, where they are as float32.

    x: [T, C].  state: [S, C, PAST].  Grid: (R, C / BLOCK_C).
    """
    request = tl.program_id(0)
    first = tl.load(starts + request)
    new = tl.load(starts + request + 1) - first
    slot = tl.load(slots + request)
    if (new <= 0) | (slot < 0):
        return
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    at = tl.arange(0, BLOCK_K)[None, :]
    mask = (channels < C) & (at < PAST)
    continued = tl.load(lengths + request) > new
    kept = inputs_at(x, state, slot, first, new - PAST + at, channels, mask, continued, x_stride, C, PAST)
    # Every input is read before one is overwritten: a thread's are not only its own.
    tl.debug_barrier()
    tl.store(state + (slot * C + channels) * PAST + at, kept, mask=mask)
