"""MXFP8 under `quant_method: mxfp8`: e4m3 weights with a power of two for every 32 inputs.

    weight            float8_e4m3fn [O, I]
    weight_scale_inv  uint8 [O, I/32]     E8M0: 2^(byte - 127), which multiplies       (also weight_scale)

The page with the layout: quantization/mxfp8/README.md. As the target of a rule: `mxfp8`.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import KVCacheMethodBase, read_kv_scheme
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.storage.fields import is_skipped, read_choice, read_names
from pymllm.quantization.storage.mxfp8_linear import BLOCK, SCALES, MXFP8LinearMethod, stored_mxfp8
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import KV_SCHEME, RUNNING, STORED_LAYER, SWITCH

IGNORED = ("modules_to_not_convert", "ignored_layers")


HARMLESS = {
    **below("kv_cache_scheme", KV_SCHEME),
    **harmless(STORED_LAYER, "modules_to_convert"),
    **harmless(RUNNING, "dequantize", only=SWITCH),
}


@register_quantization("mxfp8")
@dataclass(kw_only=True, eq=False)
class MXFP8Config(QuantizationConfig):
    """`quantization_config` with quant_method mxfp8: weight_block_size, modules_to_not_convert (ignored_layers)."""

    modules_to_not_convert: tuple[str, ...] = ()
    kv_cache_scheme: Any = None
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MXFP8Config:
        read_choice("MXFP8", config, "weight_block_size", list(BLOCK), [list(BLOCK), None])
        read_choice("MXFP8", config, "fmt", "e4m3", ["e4m3", None])
        read_choice("MXFP8", config, "scale_fmt", "ue8m0", ["ue8m0", "e8m0", None])
        read_choice("MXFP8", config, "activation_scheme", "dynamic", ["dynamic", None])
        return cls(
            modules_to_not_convert=tuple(n for field in IGNORED for n in read_names(config, field, regex="")),
            kv_cache_scheme=config.get("kv_cache_scheme"),
        )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        parse_options("mxfp8", options, {})
        return MXFP8LinearMethod()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = is_skipped(self.spellings(prefix), self.modules_to_not_convert)
        if not self.covers(layer, prefix, *SCALES, excluded=excluded):
            return None
        return stored_mxfp8(self.stored, prefix, "MXFP8", "group mx")

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        return read_kv_scheme(self.kv_cache_scheme)
