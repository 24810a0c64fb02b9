"""The AWQ spelling: AutoAWQ's GEMM layout, for one int4 setting in the whole model.

Layers left in floats are named in `modules_to_not_convert`. The layout: quantization/awq/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, IntWeight
from pymllm.quantization.formats.awq import AWQLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape
from pymllm.writing.spelling import SpelledLayer, cannot_express

OTHER = "Write it as compressed-tensors: --format compressed-tensors."


class AWQSpelling:
    """The spelling with quant_method awq, version gemm."""

    name = "awq"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose AutoAWQ's method for int4 with integer zero points.  ConfigError for any other quantised weight."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        if kind != "linear":
            raise cannot_express(
                self.name, shape, f"a quantised {kind}", fix=f"Leave it in floats: {shape.name}=none."
            )
        reason = _why_not(weight)
        if reason is not None:
            raise cannot_express(
                self.name, shape, reason, expected="int4 with integer zero points", fix=OTHER
            )
        assert isinstance(weight, IntWeight)
        whole_row = weight.group_size >= shape.in_features
        signed = not weight.scales.is_meta and bool((weight.scales < 0).any())
        method = AWQLinearMethod(-1 if whole_row else weight.group_size, weight.zeros is not None, signed)
        method.check(shape)
        return method

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype is."""
        return torch.float16

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config`.  ConfigError where layers have several group sizes."""
        methods = {layer.method for layer in layers.values() if isinstance(layer.method, AWQLinearMethod)}
        sizes = sorted({method.group_size for method in methods})
        if len(sizes) > 1:
            raise ConfigError(
                "the awq spelling has one group size for the whole model, and the layers have several",
                code="spelling",
                expected="the same group_size in every rule",
                found=", ".join(map(str, sizes)),
                fix=OTHER,
            )
        left = [
            name
            for name, layer in layers.items()
            if layer.kind != "embedding" and not isinstance(layer.method, AWQLinearMethod)
        ]
        # Negative scales come from AutoRound alone, and are only read where the config has its mark.
        mark = {"provider": "auto-round"} if any(method.signed for method in methods) else {}
        return mark | {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes[0] if sizes else 128,
            "zero_point": any(method.zero_point for method in methods),
            "version": "gemm",
            "modules_to_not_convert": left or None,
        }


def _why_not(weight: CanonicalWeight) -> str | None:
    """Return why GEMM tensors cannot hold exactly this weight, or None."""
    if not isinstance(weight, IntWeight) or weight.bits != 4:
        return f"{weight.type}"
    if weight.offsets is not None:
        return "float zero points (scale=hqq)"
    if weight.group_index is not None or weight.input_order is not None:
        return "groups in act order"
    if weight.activations != "float":
        return f"quantised activations ({weight.activations})"
    scales = weight.scales
    if not scales.is_meta and not torch.equal(scales.half().to(scales.dtype), scales):
        return f"scales in {str(scales.dtype).removeprefix('torch.')} that float16 would round"
    return None
