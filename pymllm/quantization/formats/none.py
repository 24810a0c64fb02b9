"""No quantisation: a rule `pattern=none` keeps a layer in plain floats, or decodes it to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.kernels.canonical import CanonicalWeight, DenseWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.binding import bound_weight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, WeightSpec


@register_quantization("none")
class UnquantizedConfig(QuantizationConfig):
    """The config of a checkpoint without `quantization_config`: no layer is quantised."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UnquantizedConfig:
        return cls()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        parse_options("none", options, {})
        return UnquantizedLinearMethod()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        return None


@dataclass(frozen=True)
class UnquantizedLinearMethod(LinearMethodBase):
    """Plain float weights.

    transposed: whether they are stored [I, O], as some checkpoints store the experts of a layer.
    dtype: what they are held in, for kernels that widen them as they run; None: the layer's own dtype.
    """

    transposed: bool = False
    dtype: torch.dtype | None = None
    name: ClassVar[str] = "none"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        dims = (IN, OUT) if self.transposed else (OUT, IN)
        return (WeightSpec("weight", self.dtype or shape.dtype, dims, accepts=FLOATS),)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        weight = tensors["weight"]
        return DenseWeight(weight.t().contiguous() if self.transposed else weight)

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        return DenseWeight(weight.to(self.dtype or shape.dtype))

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, DenseWeight)
        return {"weight": (weight.weight.t() if self.transposed else weight.weight).contiguous()}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if bound_weight(layer) is None:  # the layer is used on its own, and was never packed
            weight: Tensor = layer.weight  # type: ignore[assignment]
            return nn.functional.linear(x, weight.t() if self.transposed else weight, bias)
        return super().apply(layer, x, bias)

    def embed(self, layer: nn.Module, ids: Tensor) -> Tensor:
        if bound_weight(layer) is None:
            return nn.functional.embedding(ids, layer.weight)  # type: ignore[arg-type]
        return super().embed(layer, ids)
