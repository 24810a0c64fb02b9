"""E2M1 linear weights: what NVFP4 and MXFP4 share under all names."""

# I in_features, O out_features, G group_size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.canonical import Activations, CodebookWeight
from pymllm.quantization.storage.packing import E2M1


def e2m1_weight(
    codes: Tensor,
    scales: Tensor,
    row_scales: Tensor | None = None,
    activations: Activations = "float",
    input_scales: Tensor | None = None,
) -> CodebookWeight:
    """Make the canonical weight of codes [O, I] with scales [O, I/G] and, where there is a second level, of rows [O].

    A rank that holds part of one group has that one group: its size is what the rank holds.
    """
    table, group = torch.tensor(E2M1, device=codes.device), codes.shape[1] // scales.shape[1]
    return CodebookWeight(codes, table, scales, "e2m1", group, row_scales, activations, input_scales)
