"""No quantisation: `pattern=none` keeps a layer in plain floats, or decodes it to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pymllm.quantization.base import (
    LinearMethodBase,
    QuantizationConfig,
    UnquantizedLinearMethod,
    parse_options,
    register_quantization,
)


@register_quantization("none")
class UnquantizedConfig(QuantizationConfig):
    """A checkpoint without `quantization_config`."""

    @classmethod
    def get_name(cls) -> str:
        return "none"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UnquantizedConfig:
        return cls()

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        parse_options("none", options, {})
        return UnquantizedLinearMethod()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        return None
