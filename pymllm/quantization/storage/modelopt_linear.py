"""The integer linear weights of ModelOpt, which its FP4 and FP8 share no tensors with.

int4 (W4A16_AWQ, W4A8_AWQ):

    weight        uint8 [O/2, I]     two signed codes a byte: output 2k in the low nibble, 2k + 1 in the high one
    weight_scale  float [O, I/G]

int8 (W8A16, W8A8_SQ_PER_CHANNEL):

    weight        int8 [O, I]
    weight_scale  float [O]

input_scale, float [], stands beside them for activations in fp8 (W4A8_AWQ) or int8 (W8A8). W4A8_AWQ also has
weight_scale_2, float [], with which other kernels bring weights into fp8: w = code * weight_scale in all of them.
The page with the layouts: quantization/modelopt/README.md.
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pymllm.kernels.canonical import Activations, CanonicalWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.groups import check_groups
from pymllm.quantization.storage.integer_linear import grouped_weight
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec


@dataclass(frozen=True)
class ModelOptIntLinearMethod(LinearMethodBase):
    """Signed integers with a scale for every group, or (group_size 0) for each channel.

    activations: "static" (int8) and "static fp8" have an `input_scale`.
    second_scale: whether weight_scale_2 is stored.
    """

    bits: int
    group_size: int = 0
    activations: Activations = "float"
    second_scale: bool = False
    name: ClassVar[str] = "modelopt"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        if self.bits == 4:
            codes = WeightSpec("weight", torch.uint8, (OUT.packed(2), IN))
            scales: tuple[Dim, ...] = (OUT, IN.every(self.group_size))
        else:
            codes, scales = WeightSpec("weight", torch.int8, (OUT, IN)), (OUT,)
        one = {"dtype": torch.float32, "dims": (PART,), "accepts": FLOATS, "scale": True}
        return (
            codes,
            WeightSpec("weight_scale", torch.float32, scales, accepts=FLOATS, scale=True),
            *((WeightSpec("input_scale", **one),) if self.activations != "float" else ()),  # type: ignore[arg-type]
            *((WeightSpec("weight_scale_2", **one),) if self.second_scale else ()),  # type: ignore[arg-type]
        )

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if self.bits == 4:
            codes = (
                torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1) ^ 8
            )  # two's complement, raised by 8
        else:
            codes, scales = weight.view(torch.uint8) ^ 128, scales.unsqueeze(1)
        return grouped_weight(
            codes,
            scales,
            None,
            self.bits,
            self.group_size,
            shape,
            activations=self.activations,
            input_scales=tensors.get("input_scale"),
        )

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.group_size else "per channel"
        return f"{self.name} int{self.bits} {groups} sym, activations {self.activations}"
