"""FP8 e4m3 linear weights, as the formats store them that differ only in what they call things."""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.canonical import Activations, CanonicalWeight, Fp8Weight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.packing import refuse_nan_codes
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec, whole


@dataclass(frozen=True)
class NamedFp8LinearMethod(LinearMethodBase):
    """e4m3 codes and a float scale to multiply with, under the names of a format.

    format: its name.  block: the (outputs, inputs) that share a scale; (0, 0): the tensor, (1, 0): a channel.
    activations: "static" has an `input_scale` for each tensor.  weight, scale, input_scale: the tensors' names.
    flat_scale: a scale for each channel is stored as [O] instead of [O, 1].
    spaced_scale: scales of blocks are stored as [O/b0, 1, I/b1, 1].
    """

    format: str
    block: tuple[int, int]
    activations: Activations
    weight: str = "weight"
    scale: str = "weight_scale"
    input_scale: str = "input_scale"
    flat_scale: bool = False
    spaced_scale: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.format

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        dims: tuple[Dim, ...] = (OUT.every(self.block[0]), IN.every(self.block[1]))
        if self.block == (0, 0):
            dims = (PART,)
        elif self.flat_scale:
            dims = (OUT,)
        elif self.spaced_scale:
            dims = (dims[0], whole(1), dims[1], whole(1))
        specs: tuple[WeightSpec, ...] = (
            WeightSpec(self.weight, torch.float8_e4m3fn, (OUT, IN), refuse=refuse_nan_codes),
            WeightSpec(self.scale, torch.float32, dims, accepts=FLOATS, scale=True),
        )
        if self.activations == "static":
            specs += (WeightSpec(self.input_scale, torch.float32, (PART,), accepts=FLOATS, scale=True),)
        return specs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        return Fp8Weight.from_parts(
            tensors[self.weight],
            tensors[self.scale].flatten(2).flatten(0, 1) if self.spaced_scale else tensors[self.scale],
            self.block,
            [span.size for span in shape.outputs],
            self.activations,
            tensors.get(self.input_scale),
        )

    def describe(self) -> str:
        granularity = {(0, 0): "tensor", (1, 0): "channel"}
        per = granularity.get(self.block, f"block {self.block[0]}x{self.block[1]}")
        return f"{self.format} fp8 e4m3 per {per}, activations {self.activations}"
