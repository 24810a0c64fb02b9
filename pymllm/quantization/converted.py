"""A weight stored in one format and run in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape, WeightSpec


@dataclass(frozen=True)
class ConvertedLinearMethod(LinearMethodBase):
    """Reads the checkpoint's format and runs another one: decoded and encoded once, layer by layer, while loading."""

    source: LinearMethodBase
    target: LinearMethodBase

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.target.name

    @property
    def fuses(self) -> bool:
        return self.source.fuses

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        return self.source.weight_specs(shape)

    def check(self, shape: LinearShape) -> None:
        self.source.check(shape)
        self.target.check(shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        return self.convert(self.source.to_canonical(tensors, shape), shape)

    def convert(self, weight: CanonicalWeight, shape: LinearShape) -> CanonicalWeight:
        """A weight of the source format in the target's."""
        return self.target.quantize(weight.dequantize(torch.float32), shape)

    def describe(self) -> str:
        return f"{self.target.describe()} (from {self.source.describe()})"

    def source_method(self) -> LinearMethodBase:
        return self.source
