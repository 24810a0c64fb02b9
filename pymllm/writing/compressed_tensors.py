"""The compressed-tensors spelling: any mix of packed integers, int8 and float8 layers, one config group a setting.

    pack-quantized    int2 to int8 in groups or whole rows, with zero points or without
    int-quantized     int8 whole rows, activations int8
    float-quantized   float8 e4m3 with a scale a tensor, channel or block
    nvfp4-pack-quantized, mxfp4-pack-quantized   4-bit floats in groups of 16 or 32
    mxfp8-quantized   float8 e4m3 in groups of 32 of weights and inputs, whose scales are powers of two

Layers left in floats are in `ignore`. The layouts: quantization/compressed_tensors/README.md; of float8,
quantization/fp8/README.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.compressed_linear import (
    FloatQuantizedLinearMethod,
    Fp4LinearMethod,
    IntQuantizedLinearMethod,
)
from pymllm.quantization.storage.fp4_linear import fp4_kind
from pymllm.weights.spec import LinearShape
from pymllm.writing.spelling import SpelledLayer, cannot_express
from pymllm.writing.targets import patterns_for

FP4_ACTIVATIONS = {"nvfp4": "group", "mxfp4": "group"}
SUPPORTED = "int2 to int8, fp8, mxfp4, nvfp4, or floats"


class CompressedTensorsSpelling:
    """The spelling with quant_method compressed-tensors."""

    name = "compressed-tensors"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose the method for integers or float8.  ConfigError for embeddings and what no tensors can hold."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        if kind == "embedding":
            fix = f"Leave it in floats: {shape.name}=none."
            raise cannot_express(self.name, shape, "a quantised embedding", fix=fix)
        if isinstance(weight, IntWeight):
            return self._integers(weight, shape)
        if isinstance(weight, Fp8Weight):
            return self._floats(weight, shape)
        kind4 = fp4_kind(weight)
        if kind4 is not None and weight.activations in (FP4_ACTIVATIONS[kind4], "float"):
            inputs = weight.activations
            return Fp4LinearMethod(kind4, inputs, kind4 == "nvfp4" and inputs != "float")
        fix = f"Give the layer a rule with another method: {shape.name}=int4."
        raise cannot_express(self.name, shape, str(weight.type), expected=SUPPORTED, fix=fix)

    def _integers(self, weight: IntWeight, shape: LinearShape) -> LinearMethodBase:
        reason = None
        whole_rows = weight.scales.shape[1] == 1
        if weight.offsets is not None:
            reason = "float zero points (HQQ's, say)"
        elif weight.group_index is not None or weight.input_order is not None:
            reason = "groups in act order (desc_act)"
        elif weight.activations != "float" and (weight.bits != 8 or weight.zeros is not None):
            reason = f"{weight.type}"
        if reason is not None:
            fix = f"Give the layer a rule that quantises it anew: {shape.name}=int{weight.bits}."
            raise cannot_express(self.name, shape, reason, fix=fix)
        dtype = weight.scales.dtype
        packed = weight.activations == "float"
        return IntQuantizedLinearMethod(
            weight.bits,
            0 if whole_rows else weight.group_size,
            weight.zeros is None,
            packed,
            activations=weight.activations,
            # Readers hold the scales of int8 layers in float32.
            scale_dtype=dtype if packed else torch.float32,
        )

    def _floats(self, weight: Fp8Weight, shape: LinearShape) -> LinearMethodBase:
        if weight.activations == "group mx":
            return FloatQuantizedLinearMethod(weight.block, "group mx", exponent_bytes=True)
        height, width = weight.block
        if (height, width) not in ((0, 0), (1, 0)):
            # A side that covers the axis is stored as 0: any side that is long enough says the same.
            height, width = height or max(shape.out_features, width), width or max(height, 1)
            if width < shape.in_features and weight.block[1] == 0:
                width = shape.in_features
        # One group that is the whole row is a scale for each token.
        activations = "token" if weight.activations == "group" and width == 0 else weight.activations
        return FloatQuantizedLinearMethod((height, width), activations)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the model's dtype, as readers hold scales in it."""
        return model_dtype

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make the `quantization_config`: a group for each scheme, the largest first."""
        by_scheme: dict[str, tuple[dict[str, Any], list[str]]] = {}
        left: list[str] = []
        for name, layer in layers.items():
            scheme = _scheme(layer.method)
            if scheme is not None:
                by_scheme.setdefault(repr(scheme), (scheme, []))[1].append(name)
            elif layer.kind != "embedding":
                left.append(name)
        everything = [name for name, layer in layers.items() if layer.kind != "embedding"]
        schemes = sorted(by_scheme.values(), key=lambda entry: -len(entry[1]))
        groups = {}
        for index, (scheme, names) in enumerate(schemes):
            # One scheme: the class, which every reader matches first. Several: the layers by name.
            # A head is named besides: not every reader takes it for a Linear.
            heads = [name for name in names if layers[name].kind == "lm_head"]
            targets = ["Linear", *heads] if len(schemes) == 1 else patterns_for(names, everything)
            groups[f"group_{index}"] = {"targets": targets, **scheme, "output_activations": None}
        formats = {scheme["format"] for scheme, _ in schemes}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": left,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }


def _scheme(method: LinearMethodBase) -> dict[str, Any] | None:
    """Describe a method as a config group does.  Returns None where it does not quantise."""
    if isinstance(method, IntQuantizedLinearMethod):
        weights = _arguments("int", method.bits, "group" if method.group_size else "channel")
        weights |= {"group_size": method.group_size or None, "symmetric": method.symmetric}
        inputs = None if method.activations == "float" else _activations("int", method.activations)
        return {
            "format": "pack-quantized" if method.packed else "int-quantized",
            "weights": weights,
            "input_activations": inputs,
        }
    if isinstance(method, FloatQuantizedLinearMethod) and method.exponent_bytes:
        grouped = {"group_size": method.block[1], "scale_dtype": "torch.uint8"}
        return {
            "format": "mxfp8-quantized",
            "weights": _arguments("float", 8, "group") | grouped,
            "input_activations": _activations("float", "group", method.block[1]) | grouped,
        }
    if isinstance(method, FloatQuantizedLinearMethod):
        strategy = {(0, 0): "tensor", (1, 0): "channel"}.get(method.block, "block")
        weights = _arguments("float", 8, strategy)
        if strategy == "block":
            weights["block_structure"] = list(method.block)
        inputs = None
        if method.activations != "float":
            inputs = _activations("float", method.activations, method.block[1])
        return {"format": "float-quantized", "weights": weights, "input_activations": inputs}
    if isinstance(method, Fp4LinearMethod):
        strategy = "tensor_group" if method.kind == "nvfp4" else "group"
        weights = _arguments("float", 4, strategy) | {"group_size": method.group_size}
        inputs = None
        if method.activations != "float":
            inputs = {**weights, "dynamic": "local" if method.kind == "nvfp4" else True}
        return {"format": f"{method.kind}-pack-quantized", "weights": weights, "input_activations": inputs}
    return None


def _arguments(element: str, bits: int, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": element,
        "symmetric": True,
        "group_size": None,
        "strategy": strategy,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _activations(element: str, scheme: str, group_size: int = 0) -> dict[str, Any]:
    """Make the arguments of quantised activations.

    scheme: token, tensor, static, or group (of `group_size` inputs, as many as the blocks of weights have).
    """
    arguments = _arguments(element, 8, "tensor" if scheme == "static" else scheme)
    arguments["dynamic"] = scheme != "static"
    if scheme == "group":
        arguments["group_size"] = group_size
    return arguments
