"""FBGEMM FP8 (`quant_method: fbgemm_fp8`), as Meta's Llama checkpoints have it.

    weight        float8_e4m3fn [O, I]
    weight_scale  float32 [O, 1]

w = weight * weight_scale. Activations are rounded to FP8 with a scale for each token; `activation_scale_ub` bounds the
largest magnitude that the scale is chosen for. The page with the layout: quantization/fbgemm-fp8/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pymllm.kernels.canonical import CHANNEL
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fields import is_skipped, read_names, unsupported
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.weights.report import Skip

METHOD = NamedFp8LinearMethod(CHANNEL, "token", format="fbgemm-fp8")


@register_quantization("fbgemm-fp8")
@dataclass(kw_only=True, eq=False)
class FbgemmFp8Config(QuantizationConfig):
    """`quantization_config` with quant_method fbgemm_fp8: activation_scale_ub, modules_to_not_convert.

    The bound (1200 by default) only matters to tokens with larger inputs. Here it is read and not applied: such a token
    has the scale of its own largest magnitude.
    """

    activation_scale_ub: float = 1200.0
    modules_to_not_convert: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FbgemmFp8Config:
        bound = config.get("activation_scale_ub", 1200.0)
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or bound <= 0:
            raise unsupported("FBGEMM FP8", "activation_scale_ub", bound, "a positive number")
        return cls(
            activation_scale_ub=float(bound),
            modules_to_not_convert=read_names(config, "modules_to_not_convert", regex=""),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = is_skipped(self.spellings(prefix), self.modules_to_not_convert)
        return METHOD if self.covers(layer, prefix, "weight_scale", excluded=excluded) else None

    def skip_reason(self, tensor: str) -> Skip | str | None:
        prefix, _, suffix = tensor.rpartition(".")
        if suffix == "input_scale_ub" and f"{prefix}.weight_scale" in self.stored:
            return Skip("activation_scale_ub again, as a tensor", self._refuse_bound)
        return None

    def _refuse_bound(self, stored: Tensor) -> str | None:
        """Return why a layer's bound is not the config's, or None."""
        found = stored.float().flatten().tolist()
        close = len(found) == 1 and math.isclose(found[0], self.activation_scale_ub, rel_tol=2**-7)
        return None if close else f"{found[:4]}, where the config has {self.activation_scale_ub}"
