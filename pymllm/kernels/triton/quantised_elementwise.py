"""RMSNorm and gated activations that give the codes an 8-bit product takes, a row in each block.

Results are rounded to their dtype before they are quantised: codes and scales are those of `eight_bit.quantise` over
what the kernels of `elementwise.py` give.
"""

# T tokens, H hidden size, N half the gated size, G inputs that share a scale

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX
from pymllm.kernels.quantised_rows import QuantisedRows, RowCodes
from pymllm.kernels.scaled_mm import empty_codes, empty_scales
from pymllm.kernels.triton.eight_bit import LONGEST_ROW
from pymllm.kernels.triton.eight_bit_kernels import encoded, scale_of
from pymllm.kernels.triton.elementwise_kernels import gated
from pymllm.kernels.triton.launch import inline, interpreting, kernel
from pymllm.kernels.triton.operators import operator
from pymllm.kernels.triton.tuning import divide, next_power

if TYPE_CHECKING:
    import triton.language as tl


def why_not_codes(codes: RowCodes, size: int) -> str | None:
    """Return why rows of `size` cannot be quantised to such codes in one block, or None."""
    if size > LONGEST_ROW:
        return f"quantises rows of up to {LONGEST_ROW}, not {size}"
    if codes.group and codes.group != next_power(codes.group):
        return f"takes groups of powers of two, not {codes.group}"
    return None


def norm_quantised(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, codes: RowCodes
) -> tuple[QuantisedRows, Tensor]:
    """Normalise as `elementwise.rms_norm` does, and quantise the first result."""
    quantised, scales, summed = norm_and_quantise(x, weight, eps, residual, codes.integer, codes.group)
    return QuantisedRows(quantised, scales, x.dtype), summed


def gate_quantised(x: Tensor, activation: str, codes: RowCodes) -> QuantisedRows:
    """Multiply as `elementwise.gate_and_mul` does, and quantise the result."""
    quantised, scales = gate_and_quantise(x, activation, codes.integer, codes.group)
    return QuantisedRows(quantised, scales, x.dtype)


def _empty(x: Tensor, size: int, integer: bool, group: int) -> tuple[Tensor, Tensor]:
    """Allocate codes [*, size] and scales [rows, size / group] for the rows of x."""
    dtype = torch.int8 if integer else torch.float8_e4m3fn
    scales = empty_scales(x, x.shape[:-1].numel(), divide(size, group or max(size, 1)))
    return empty_codes(x, (*x.shape[:-1], size), dtype), scales


def _coding(codes: Tensor, dtype: torch.dtype, size: int, group: int) -> tuple[Tensor, dict[str, Any]]:
    """Return codes as the kernels store them, and the constants of `store_codes`."""
    integer, hardware, block = codes.dtype is torch.int8, not interpreting(), next_power(size)
    side = min(group or block, block)
    constants: dict[str, Any] = {
        "LARGEST": 127.5 if integer else E4M3_MAX,
        "SMALLEST": torch.finfo(dtype).smallest_normal,
        "LOW": -128.0 if integer else -E4M3_MAX,
        "INTEGER": integer,
        "HARDWARE": hardware,
        "BLOCK": block,
        "GROUPS": block // side,
        "GROUP": side,
        "num_warps": min(16, max(1, block // 512)),
    }
    return codes if integer or hardware else codes.view(torch.uint8), constants


@operator(
    "norm_and_quantise(Tensor x, Tensor? weight, float eps, Tensor? residual, bool integer, int group) "
    "-> (Tensor, Tensor, Tensor)",
    lambda x, weight, eps, residual, integer, group: (
        *_empty(x, x.shape[-1], integer, group),
        x.new_empty(0) if residual is None else torch.empty_like(x),
    ),
)
def norm_and_quantise(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, integer: bool, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual to x, and normalise and quantise the sum.

    x, residual: [*, H].  Returns codes, scales and the sum; the last is empty without a residual.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes, scales = _empty(x, size, integer, group)
    summed = (
        x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    )
    if rows.shape[0] and size:
        others = None if residual is None else residual.reshape(-1, size)
        stored, constants = _coding(codes, x.dtype, size, group)
        norm_rows_to_codes.launch(
            (rows.shape[0],),
            rows,
            others if others is None or others.stride(-1) == 1 else others.contiguous(),
            weight,
            stored,
            scales,
            None if residual is None else summed,
            size,
            rows.stride(0),
            0 if others is None else others.stride(0),
            scales.stride(1),
            scales.shape[1],
            eps,
            FLOAT_WEIGHT=weight is not None and weight.dtype is torch.float32,
            # As many warps as `norm_rows` has, so that it sums in the same order.
            **constants | {"num_warps": min(16, max(1, next_power(size) // 256))},
        )
    return codes, scales, summed


@operator(
    "gate_and_quantise(Tensor x, str activation, bool integer, int group) -> (Tensor, Tensor)",
    lambda x, activation, integer, group: _empty(x, x.shape[-1] // 2, integer, group),
)
def gate_and_quantise(x: Tensor, activation: str, integer: bool, group: int) -> tuple[Tensor, Tensor]:
    """Multiply activation(gate) by up, and quantise the product.

    x: [*, 2N], gate first.  Returns codes [*, N] and scales.
    """
    size = x.shape[-1] // 2
    rows = x.reshape(-1, 2 * size)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes, scales = _empty(x, size, integer, group)
    if codes.numel():
        stored, constants = _coding(codes, x.dtype, size, group)
        gate_rows_to_codes.launch(
            (rows.shape[0],),
            rows,
            stored,
            scales,
            size,
            rows.stride(0),
            scales.stride(1),
            scales.shape[1],
            ACTIVATION=activation,
            **constants,
        )
    return codes, scales


@inline
def store_codes(
    values,
    codes,
    scales,
    size,
    scale_stride,
    groups,
    dtype: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOW: tl.constexpr,
    INTEGER: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Quantise one row.  values: [BLOCK] float32, already rounded to dtype, 0 beyond `size`.

    codes: [size].  scales: [groups], each of GROUP inputs, scale_stride apart.
    """
    tile = tl.reshape(values, (GROUPS, GROUP))
    scale = scale_of(tl.max(tl.abs(tile), axis=1), dtype, LARGEST, SMALLEST, HARDWARE)
    group = tl.arange(0, GROUPS)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    wide = tl.zeros((GROUPS, GROUP), tl.float32) + scale[:, None]
    tl.store(codes + columns, encoded(tile, wide, dtype, LOW, INTEGER, HARDWARE), mask=columns < size)
    tl.store(scales + group.to(tl.int64) * scale_stride, scale, mask=group < groups)


@kernel(varying=("scale_stride",))
def norm_rows_to_codes(
    x,
    residual,
    weight,
    codes,
    scales,
    summed,
    size,
    x_stride,
    residual_stride,
    scale_stride,
    groups,
    eps,
    FLOAT_WEIGHT: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOW: tl.constexpr,
    INTEGER: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Normalise one row of x, or of x plus the residual, and quantise it.

    x, residual, summed, codes: [T, H].  scales: [H/G, T].  Grid: (T,).
    """
    row = tl.program_id(0).to(tl.int64)
    dtype = x.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        total = values.to(dtype)
        tl.store(summed + row * size + columns, total, mask=mask)
        values = total.to(tl.float32)
    result = values * (1.0 / tl.sqrt_rn(tl.sum(values * values, axis=0) / size + eps))
    if weight is not None:
        factors = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        if not FLOAT_WEIGHT:
            result = result.to(dtype).to(tl.float32)
        result *= factors
    store_codes(
        result.to(dtype).to(tl.float32),
        codes + row * size,
        scales + row,
        size,
        scale_stride,
        groups,
        dtype,
        LARGEST,
        SMALLEST,
        LOW,
        INTEGER,
        HARDWARE,
        BLOCK,
        GROUPS,
        GROUP,
    )


@kernel(varying=("scale_stride",))
def gate_rows_to_codes(
    x,
    codes,
    scales,
    size,
    stride,
    scale_stride,
    groups,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOW: tl.constexpr,
    INTEGER: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply activation(gate) by up in one row, and quantise it.

    x: [T, 2N].  codes: [T, N].  scales: [N/G, T].  Grid: (T,).
    """
    row = tl.program_id(0).to(tl.int64)
    dtype = x.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(x + row * stride + columns, mask=mask, other=0.0)
    up = tl.load(x + row * stride + size + columns, mask=mask, other=0.0)
    store_codes(
        gated(gate, up, ACTIVATION).to(tl.float32),
        codes + row * size,
        scales + row,
        size,
        scale_stride,
        groups,
        dtype,
        LARGEST,
        SMALLEST,
        LOW,
        INTEGER,
        HARDWARE,
        BLOCK,
        GROUPS,
        GROUP,
    )
