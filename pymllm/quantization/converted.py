"""The method of a layer that is stored in one format and runs in another."""

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
    """A method that reads the format of `source` and runs that of `target`.

    Weights are decoded and encoded again once, layer by layer, while they load.
    """

    source: LinearMethodBase
    target: LinearMethodBase

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.target.name

    @property
    def fuses(self) -> bool:
        return self.source.fuses

    @property
    def by_outputs(self) -> bool:
        return self.source.by_outputs and self.target.quantizes_by_outputs

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        return self.source.weight_specs(shape)

    def check(self, shape: LinearShape) -> None:
        self.source.check(shape)
        self.target.check(shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        return self.convert(self.source.to_canonical(tensors, shape), shape)

    def convert(self, weight: CanonicalWeight, shape: LinearShape) -> CanonicalWeight:
        """Convert a weight of the source format to the target's."""
        return self.target.quantize(weight.dequantize(torch.float32), shape)

    def describe(self) -> str:
        return f"{self.target.describe()} (from {self.source.describe()})"

    def source_method(self) -> LinearMethodBase:
        return self.source
