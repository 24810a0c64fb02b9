"""Products of fp8 by fp8 that torch makes: what `torch._scaled_mm` takes, and how it is asked.

torch tells how scales are meant from their shapes and strides, and cuBLAS wants more than torch checks:
pytorch, aten/src/ATen/native/cuda/ScaledBlas.cpp (2.10 to 2.13), and the cuBLAS manual, "128-element 1D and 128x128 2D
block scaling". What neither says of the GPU at hand is found out by the first call: where it refuses, it is not asked
for that kind of product again, and the caller multiplies.
"""

# T tokens, O out_features, I in_features, G groups of 128 inputs

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from pymllm.kernels.hardware import Device

Scaling = Literal["tensor", "row", "block"]

SIDE = 128  # inputs of a group of activations, and both sides of a weight's block
ROWS = 4  # blocks: cuBLAS takes multiples of as many rows
DTYPES = (torch.bfloat16, torch.float16)
FIRST_CUDA = (12, 9)  # whose cuBLAS multiplies blocks

logger = logging.getLogger("pymllm")
_refused: set[tuple[Scaling, torch.dtype, bool]] = set()


def why_not_scaled_mm(
    scaling: Scaling, device: Device, out_features: int, in_features: int, dtype: torch.dtype
) -> str | None:
    """Return why `scaled_mm` is not asked for a product, or None.

    A device that is known by name alone is judged as if it were here, with a torch built for CUDA 12.9.
    """
    architecture = device.architecture
    if architecture is None or not architecture.fp8:
        return f"{device.name} does not multiply float8_e4m3fn"
    if dtype not in DTYPES:
        return f"writes float16 or bfloat16, not {dtype}"
    if out_features % 16 or in_features % 16:
        return f"needs multiples of 16, the weight is {out_features} x {in_features}"
    if scaling == "row" and not architecture.is_nvidia and dtype is not torch.bfloat16:
        return f"writes bfloat16 on {device.name} where each row has a scale, not {dtype}"
    if scaling == "block":
        if not architecture.is_nvidia or architecture.capability[0] != 9:
            return f"multiplies blocks on GPUs of compute capability 9, not on {device.name}"
        if in_features % (4 * SIDE):
            # Columns of a weight's scales begin at 16 bytes in cuBLAS; torch lays them side by side.
            return f"multiplies blocks of multiples of {4 * SIDE} inputs, the weight has {in_features}"
        cuda = _cuda_version()
        if cuda is not None and cuda < FIRST_CUDA:
            return f"multiplies blocks from CUDA 12.9 on, torch is built for {torch.version.cuda}"
    return None


def scaled_mm(
    codes: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scaling: Scaling,
    device: Device,
) -> Tensor | None:
    """Multiply fp8 activations by an fp8 weight, or return None where torch does not.

    codes: [T, I].  weight: [O, I], contiguous.  Returns [T, O] in dtype.
    "tensor": x_scales [T, 1], all the same; scales [1, 1].  "row": x_scales [T, 1]; scales [1, O].
    "block": x_scales [T, G] as `empty_scales` allocates them; scales [G, O/128], the inputs of a column side by side.
    """
    kind = scaling, dtype, bias is not None
    tokens, in_features = codes.shape
    out_features = weight.shape[0]
    if kind in _refused or why_not_scaled_mm(scaling, device, out_features, in_features, dtype) is not None:
        return None
    if not tokens:
        return codes.new_empty((0, out_features), dtype=dtype)
    if not codes.is_contiguous():
        codes = codes.contiguous()
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    if scaling == "tensor":
        x_scales = x_scales[:1]
    elif scaling == "row":
        # torch looks at the second stride even where it is that of an axis of one.
        x_scales, scales = x_scales.flatten().unsqueeze(1), scales.flatten().unsqueeze(0)
    else:
        codes, x_scales = _to_fours(codes), _scales_to_fours(x_scales)
    operands = (codes, weight, x_scales, scales, *(() if bias is None else (bias,)))
    if any(tensor.data_ptr() % 16 for tensor in operands):
        return None  # of this call alone: a tensor that lies within another
    try:
        y = torch._scaled_mm(codes, weight.t(), scale_a=x_scales, scale_b=scales, bias=bias, out_dtype=dtype)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # the fault is the device's, which no other kernel mends
    except (RuntimeError, ValueError) as error:
        _refused.add(kind)
        logger.warning(
            "torch._scaled_mm refuses products of fp8 by fp8 with scales by %s in %s%s: pymllm's own kernel multiplies "
            "them from now on. torch says: %s",
            *(scaling, dtype, " with a bias" if bias is not None else "", str(error).partition("\n")[0]),
        )
        return None
    return y[:tokens]


def empty_codes(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate codes, [*, I], with memory for as many rows as `scaled_mm` multiplies: it then copies none."""
    rows = torch.Size(shape[:-1]).numel()
    return like.new_empty((_up_to_fours(rows), shape[-1]), dtype=dtype)[:rows].view(shape)


def empty_scales(like: Tensor, rows: int, groups: int) -> Tensor:
    """Allocate float32 scales of activations, [rows, groups], those of a group side by side."""
    return like.new_empty((groups, _up_to_fours(rows)), dtype=torch.float32)[:, :rows].t()


def _up_to_fours(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


def _to_fours(codes: Tensor) -> Tensor:
    """Return at least the rows of codes, and as many of any value behind them as make their number one of fours."""
    tokens, in_features = codes.shape
    rows = _up_to_fours(tokens)
    if rows == tokens:
        return codes
    if _room(codes) >= rows * in_features:
        return codes.as_strided((rows, in_features), (in_features, 1))
    more = codes.new_empty((rows, in_features))
    more[:tokens].copy_(codes)
    return more


def _scales_to_fours(scales: Tensor) -> Tensor:
    """Return scales, [T, G], for as many rows as `_to_fours` returns, those of a group side by side."""
    tokens, groups = scales.shape
    rows = _up_to_fours(tokens)
    if scales.stride() == (1, rows) and _room(scales) >= rows * groups:
        return scales.as_strided((rows, groups), (1, rows))
    more = empty_scales(scales, rows, groups)
    more[:tokens].copy_(scales)
    return more


def _room(tensor: Tensor) -> int:
    """Return the number of elements from a tensor's first one to the end of its memory."""
    return int(tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset())


def _cuda_version() -> tuple[int, int] | None:
    """Return the version of CUDA that torch is built for, or None for a torch without CUDA."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)
