"""ModelOpt's spelling: NVFP4 and three kinds of float8, one in the whole model or layer by layer.

    W4A16_NVFP4                weight only; NVFP4 where the source has scales for activations in 4 bits
    FP8                        a scale a tensor, activations=static
    FP8_PER_CHANNEL_PER_TOKEN  a scale a channel, activations=token
    FP8_PB_WO                  blocks of 128 x 128, activations=float

The settings are in config.json and in hf_quant_config.json. The layouts: quantization/modelopt/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import pymllm
from pymllm.kernels.canonical import CHANNEL, TENSOR, CanonicalWeight, DenseWeight, Fp8Weight
from pymllm.quantization.formats.modelopt import BLOCK, GROUP, NVFP4LinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fp4_linear import fp4_kind
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.weights.spec import LinearShape
from pymllm.writing.spelling import SpelledLayer, cannot_express

# (block, activations) -> the method, and its algorithm.
FP8 = {
    (TENSOR, "static"): (NamedFp8LinearMethod(TENSOR, "static", format="modelopt"), "FP8"),
    (CHANNEL, "token"): (
        NamedFp8LinearMethod(CHANNEL, "token", format="modelopt", flat_scale=True),
        "FP8_PER_CHANNEL_PER_TOKEN",
    ),
    ((BLOCK, BLOCK), "float"): (
        NamedFp8LinearMethod((BLOCK, BLOCK), "float", format="modelopt", spaced_scale=True),
        "FP8_PB_WO",
    ),
}
ALGORITHMS: dict[LinearMethodBase, str] = {
    NVFP4LinearMethod(False): "W4A16_NVFP4",
    NVFP4LinearMethod(True): "NVFP4",
    **dict(FP8.values()),
}
SUPPORTED = (
    "nvfp4, fp8:granularity=tensor,activations=static, fp8:granularity=channel,activations=token, "
    "fp8:granularity=block,activations=float, or floats"
)


class ModelOptSpelling:
    """The spelling with quant_method modelopt."""

    name = "modelopt"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose the method for NVFP4 or float8.  ConfigError for embeddings and anything else that is quantised."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        if kind == "embedding":
            fix = f"Leave it in floats: {shape.name}=none."
            raise cannot_express(self.name, shape, "a quantised embedding", fix=fix)
        if fp4_kind(weight) == "nvfp4" and weight.activations in ("float", "group"):
            return NVFP4LinearMethod(weight.activations == "group")
        if isinstance(weight, Fp8Weight) and (weight.block, weight.activations) in FP8:
            method = FP8[weight.block, weight.activations][0]
            if method.block != (BLOCK, BLOCK) or not any(n % BLOCK for n in weight.shape):
                return method
        fix = f"Give the layer a rule with one of these, or write --format compressed-tensors: {shape.name}=nvfp4."
        raise cannot_express(self.name, shape, str(weight.type), expected=SUPPORTED, fix=fix)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float32, in which all scales are stored."""
        return torch.float32

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config`: one algorithm, or MIXED_PRECISION with that of each layer."""
        algorithms = {name: ALGORITHMS.get(layer.method) for name, layer in layers.items()}
        used = {algorithm for algorithm in algorithms.values() if algorithm is not None}
        left = [n for n, a in algorithms.items() if a is None and layers[n].kind != "embedding"]
        common: dict[str, Any] = {
            "quant_method": "modelopt",
            "quant_algo": next(iter(used)) if len(used) == 1 else "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "ignore": left,
            "producer": {"name": "pymllm", "version": pymllm.__version__},
        }
        if any("NVFP4" in algorithm for algorithm in used):
            common["group_size"] = GROUP
        if len(used) > 1:
            common["quantized_layers"] = {n: _layer(a) for n, a in algorithms.items() if a is not None}
        return common

    def side_configs(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Make hf_quant_config.json, which says the same in other words."""
        apart = ("quant_method", "producer", "ignore")
        settings = {key: value for key, value in quantization.items() if key not in apart}
        settings["exclude_modules"] = quantization["ignore"]
        return {"hf_quant_config.json": {"producer": quantization["producer"], "quantization": settings}}


def _layer(algorithm: str) -> dict[str, Any]:
    return {"quant_algo": algorithm} | ({"group_size": GROUP} if "NVFP4" in algorithm else {})
