"""MXFP4 under `quant_method: mxfp4`: 4-bit floats (E2M1) with a power of two for every 32 inputs.

    weight        uint8 [O, I/2]     two codes a byte, the low nibble first          (also weight_packed)
    weight_scale  uint8 [O, I/32]    E8M0: 2^(byte - 127)                            (also weight_scales, scales)
    blocks        uint8 [O, I/32, 16]  the same bytes in place of weight: the stacked experts of gpt-oss

w = E2M1[code] * scale. The page with the layout: quantization/mxfp4/README.md. As the target of a rule: `mxfp4`.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.storage.fields import is_skipped, read_choice, read_names
from pymllm.quantization.storage.mxfp4_linear import GROUP, SCALES, MXFP4LinearMethod, stored_mxfp4
from pymllm.quantization.storage.settings import HarmlessSettings, harmless
from pymllm.quantization.storage.writer_settings import RUNNING, SWITCH


@register_quantization("mxfp4")
@dataclass(kw_only=True, eq=False)
class MXFP4Config(QuantizationConfig):
    """`quantization_config` with quant_method mxfp4: modules_to_not_convert."""

    modules_to_not_convert: tuple[str, ...] = ()
    harmless: ClassVar[HarmlessSettings] = harmless(RUNNING, "dequantize", only=SWITCH)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MXFP4Config:
        read_choice("MXFP4", config, "group_size", GROUP, [GROUP])
        return cls(modules_to_not_convert=read_names(config, "modules_to_not_convert"))

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        parse_options("mxfp4", options, {})
        return MXFP4LinearMethod()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = is_skipped(self.spellings(prefix), self.modules_to_not_convert)
        if not self.covers(layer, prefix, *SCALES, excluded=excluded):
            return None
        return stored_mxfp4(self.stored, prefix, "MXFP4")
