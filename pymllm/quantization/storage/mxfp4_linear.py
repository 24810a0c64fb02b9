"""MXFP4 linear weights under all names: 4-bit floats (E2M1) with a power of two for every 32 inputs.

    weight        uint8 [O, I/2]     two codes a byte, the low nibble first          (also weight_packed)
    weight_scale  uint8 [O, I/32]    E8M0: 2^(byte - 127)                            (also weight_scales, scales)
    blocks        uint8 [O, I/32, 16]  the same bytes in place of weight: the stacked experts of gpt-oss
    input_scale   float []             for activations that are rounded to fp8

w = E2M1[code] * scale. The page with the layout: quantization/mxfp4/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pymllm.kernels.canonical import Activations, CanonicalWeight
from pymllm.quantization.method import LinearMethodBase, StoredTensor
from pymllm.quantization.storage.fields import unsupported
from pymllm.quantization.storage.fp4_linear import e2m1_weight
from pymllm.quantization.storage.groups import check_groups, check_share
from pymllm.quantization.storage.packing import E2M1, encode_e2m1, refuse_nan_scales, unpack_nibbles_low_first
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec, whole

GROUP = 32
LARGEST = 6.0  # the largest value of E2M1
BIAS = 127  # the exponent bias of E8M0
E8M0 = torch.float8_e8m0fnu
SCALES = ("weight_scale", "weight_scales", "scales")  # all names of the same tensor


@dataclass(frozen=True)
class MXFP4LinearMethod(LinearMethodBase):
    """MXFP4 weights.

    scale_dtype: how the file declares the exponents, plain bytes or E8M0; the bytes are the same.
    blocks: whether each block of codes is a row of its own.
    activations: "group": they are rounded to the same type; "static fp8": to e4m3, with an `input_scale`.
    """

    scale_dtype: torch.dtype = torch.uint8
    blocks: bool = False
    activations: Activations = "float"
    name: ClassVar[str] = "mxfp4"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        codes = WeightSpec("weight", torch.uint8, (OUT, IN.packed(2)), aliases=("weight_packed",))
        if self.blocks:
            codes = WeightSpec("blocks", torch.uint8, (OUT, IN.packed(GROUP), whole(GROUP // 2)))
        grid = (OUT, IN.every(GROUP))
        scales = WeightSpec(SCALES[0], self.scale_dtype, grid, aliases=SCALES[1:], refuse=refuse_nan_scales)
        if self.activations != "static fp8":
            return codes, scales
        return codes, scales, WeightSpec("input_scale", torch.float32, (PART,), accepts=FLOATS, scale=True)

    def check(self, shape: LinearShape) -> None:
        check_groups(GROUP, shape, what="MXFP4 blocks")
        check_share(GROUP, shape, what="blocks")

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        packed = tensors["blocks"].flatten(1) if self.blocks else tensors["weight"]
        return e2m1_weight(
            unpack_nibbles_low_first(packed),
            tensors["weight_scale"].contiguous().view(E8M0),
            activations=self.activations,
            input_scales=tensors.get("input_scale"),
        )

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Round a float weight [O, I].

        Of the two powers of two next to its peak / 6, each block has the one with the smaller squared error.
        """
        group = min(GROUP, weight.shape[1])
        blocks = weight.float().unflatten(1, (-1, group))  # [O, I/32, 32]
        # With the larger exponent peak / scale is in 3..6, where nothing is clipped; with the smaller it is in 6..12.
        exponents = torch.frexp(blocks.abs().amax(-1) / LARGEST)[1]
        larger, smaller = (_encode(blocks, exponents - step) for step in (0, 1))
        better = smaller[2] < larger[2]
        codes = torch.where(better[..., None], smaller[0], larger[0])
        scales = torch.where(better, smaller[1], larger[1])
        return e2m1_weight(codes.flatten(1), scales.view(E8M0), activations=self.activations)

    def describe(self) -> str:
        return self.name if self.activations == "float" else f"{self.name}, activations {self.activations}"


def _encode(blocks: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round blocks [O, I/32, 32] with scales of these exponents.

    Returns codes, scale bytes [O, I/32] and squared errors [O, I/32].
    """
    stored = (exponents + BIAS).clamp(0, 2 * BIAS).to(torch.uint8)
    scales = stored.view(E8M0).float().unsqueeze(-1)
    codes = encode_e2m1(blocks / scales)
    values = torch.tensor(E2M1, device=codes.device)[codes.int()]
    return codes, stored, (values * scales - blocks).square().sum(-1)


def stored_mxfp4(
    stored: Mapping[str, StoredTensor], prefix: str, what: str, activations: Activations = "float"
) -> MXFP4LinearMethod:
    """Make the method that reads the layer `prefix`, by how the file declares its scales.

    stored: the checkpoint's headers.  what: the format's name, for the ConfigError where the scales are no exponents.
    """
    scale = next((stored[name] for name in (f"{prefix}.{s}" for s in SCALES) if name in stored), None)
    if scale is not None and scale.dtype not in (torch.uint8, E8M0):
        expected = "uint8 or float8_e8m0fnu"
        raise unsupported(what, "weight_scale", str(scale.dtype), expected, within=f"{prefix}.")
    dtype = torch.uint8 if scale is None or scale.dtype is None else scale.dtype
    return MXFP4LinearMethod(dtype, f"{prefix}.blocks" in stored, activations)
