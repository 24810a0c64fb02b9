"""Decoders of the written layouts, from the words of quantization/*/README.md; they share no code with the package.

Legend: O out_features, I in_features, G group_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: Tensor, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """[N, W] int32 words to [N, 32·W/bits] fields, the lowest bits first; bits 4 or 8."""
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    fields = torch.stack([(unsigned >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], -1)
    if columns is not None:
        ordered = torch.empty_like(fields)
        ordered[..., list(columns)] = fields
        fields = ordered
    return fields.flatten(1)


def decode_awq(tensors: dict[str, Tensor], name: str) -> Tensor:
    """[O, I] float64 by the formula of quantization/awq/README.md."""
    codes = unpack(tensors[f"{name}.qweight"], 4, AWQ_COLUMNS)  # [I, O]
    zeros = unpack(tensors[f"{name}.qzeros"], 4, AWQ_COLUMNS)  # [I/G, O]
    scales = tensors[f"{name}.scales"].double()
    each = codes.shape[0] // scales.shape[0]
    return ((codes - zeros.repeat_interleave(each, 0)) * scales.repeat_interleave(each, 0)).t()


def decode_compressed(tensors: dict[str, Tensor], name: str, bits: int = 4) -> Tensor:
    """[O, I] float64 by the formulas of quantization/compressed_tensors/README.md."""
    scales = tensors[f"{name}.weight_scale"].double()
    if f"{name}.weight_packed" not in tensors:
        weight = tensors[f"{name}.weight"].double()
        if scales.shape[-1] > 1 or (scales.ndim == 2 and scales.shape[0] not in (1, weight.shape[0])):
            rows = torch.arange(weight.shape[0]) * scales.shape[0] // weight.shape[0]
            columns = torch.arange(weight.shape[1]) * scales.shape[1] // weight.shape[1]
            scales = scales[rows][:, columns]
        return weight * scales
    out_features, in_features = tensors[f"{name}.weight_shape"].tolist()
    codes = unpack(tensors[f"{name}.weight_packed"], bits)[:, :in_features]
    zeros: Tensor | int = 2 ** (bits - 1)
    each = in_features // scales.shape[1]
    if f"{name}.weight_zero_point" in tensors:
        packed = tensors[f"{name}.weight_zero_point"]  # [O·bits/32, I/G]
        zeros = unpack(packed.t().contiguous(), bits)[:, :out_features].t().repeat_interleave(each, 1)
    return (codes - zeros) * scales.repeat_interleave(each, 1)


def decode_gptq(tensors: dict[str, Tensor], name: str, bits: int, minus_one: int) -> Tensor:
    """[O, I] float64 by the formula of quantization/gptq/README.md; bits 4 or 8.  minus_one: 0 for gptq_v2."""
    qweight, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"].double()
    codes = unpack(qweight.t().contiguous(), bits).t()  # [I, O]
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = (tensors[f"{name}.qzeros"].to(torch.int64) + minus_one * ones) & 0xFFFFFFFF
    zeros = torch.stack([(words >> shift) & (2**bits - 1) for shift in range(0, 32, bits)], -1).flatten(1)
    groups = tensors[f"{name}.g_idx"].long()
    return ((codes - zeros[groups]) * scales[groups]).t()


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def decode_modelopt(tensors: dict[str, Tensor], name: str) -> Tensor:
    """[O, I] float64 by the formulas of quantization/modelopt/README.md."""
    weight, scales = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].double()
    if weight.dtype is torch.uint8:
        values = FP4[torch.stack((weight & 15, weight >> 4), -1).flatten(1).long()]
        second = tensors[f"{name}.weight_scale_2"]
        assert second.shape == ()
        return values * scales.repeat_interleave(16, 1) * second.double()
    if scales.ndim == 4:
        scales = scales[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    return weight.double() * (scales[:, None] if scales.ndim == 1 else scales)
