"""ModelOpt's spellings of NVFP4 and FP8.  As the target of a rule, NVFP4 is `nvfp4`.

NVFP4 (`quant_algo` NVFP4, W4A16_NVFP4):

    weight          uint8 [O, I/2]           two E2M1 codes a byte, the low nibble first
    weight_scale    float8_e4m3fn [O, I/16]
    weight_scale_2  float32 []               a second scale, which multiplies too
    input_scale     float32 []               the same for activations, where they are in 4 bits as well (W4A4)

w = E2M1[code] * (weight_scale * weight_scale_2).

The FP8 algorithms have weight float8_e4m3fn [O, I] and

    FP8                        weight_scale [], input_scale []
    FP8_PER_CHANNEL_PER_TOKEN  weight_scale [O]
    FP8_PB_WO                  weight_scale [O/128, 1, I/128, 1]

The page with the layouts: quantization/modelopt/README.md.
"""

# I in_features, O out_features, P parts of a fused layer

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymllm.kernels.canonical import CHANNEL, E4M3_MAX, TENSOR, CanonicalWeight, CodebookWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    read_kv_scheme,
    unsupported_kv_cache,
    unused_kv_tensor,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.storage.fields import read_choice, read_names, unsupported
from pymllm.quantization.storage.fp4_linear import e2m1_weight, exact_reciprocal
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.quantization.storage.groups import check_groups, check_share, rows_of_parts
from pymllm.quantization.storage.packing import (
    encode_e2m1,
    pack_nibbles_low_first,
    unpack_nibbles_low_first,
)
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec

_unsupported = functools.partial(unsupported, "ModelOpt")

GROUP = 16
LARGEST = 6.0  # the largest value of E2M1
E4M3 = torch.float8_e4m3fn
ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
BLOCK = 128  # both sides of a block of FP8_PB_WO
KV_ALGORITHMS: dict[str, Literal["fp8", "int8"]] = {"FP8": "fp8", "INT8": "int8"}


@dataclass(frozen=True)
class NVFP4LinearMethod(LinearMethodBase):
    """NVFP4 weights.  static_input: whether the checkpoint has an `input_scale`, for activations in 4 bits."""

    static_input: bool = False
    name: ClassVar[str] = "nvfp4"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        specs: tuple[WeightSpec, ...] = (
            WeightSpec("weight", torch.uint8, (OUT, IN.packed(2))),
            # Not declared a scale, as these must not be zero, and a block of zeros may have the scale zero.
            WeightSpec("weight_scale", E4M3, (OUT, IN.every(GROUP))),
            WeightSpec("weight_scale_2", torch.float32, (PART,), accepts=FLOATS, scale=True),
        )
        if self.static_input:
            specs += (WeightSpec("input_scale", torch.float32, (PART,), accepts=FLOATS, scale=True),)
        return specs

    def check(self, shape: LinearShape) -> None:
        check_groups(GROUP, shape, what="NVFP4 blocks")
        check_share(GROUP, shape, what="blocks")

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        static = self.static_input
        return e2m1_weight(
            unpack_nibbles_low_first(tensors["weight"]),
            tensors["weight_scale"],
            rows_of_parts(tensors["weight_scale_2"], shape),
            "group" if static else "float",
            # The file holds what to multiply codes with, the canonical weight its reciprocal.
            tensors["input_scale"].reciprocal() if static else None,
        )

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Round a float weight [O, I] so that every block's peak becomes 6, and every part's largest scale 448."""
        group = min(GROUP, weight.shape[1])
        blocks = weight.float().unflatten(1, (-1, group))  # [O, I/16, 16]
        peaks = blocks.abs().amax(-1)
        smallest = torch.finfo(torch.float32).smallest_normal
        parts = peaks.split([span.size for span in shape.outputs])
        second = torch.stack([part.amax() if part.numel() else peaks.new_zeros(()) for part in parts])
        second = (second / (LARGEST * E4M3_MAX)).clamp(min=smallest)
        # A number that is also a reciprocal: other writers store what to divide by.
        rows = rows_of_parts(second.reciprocal().reciprocal(), shape)
        scales = (peaks / (LARGEST * rows[:, None])).clamp(2.0**-9, E4M3_MAX).to(E4M3)
        codes = encode_e2m1(blocks / (scales.float() * rows[:, None])[..., None])
        return e2m1_weight(codes.flatten(1), scales, rows)

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, CodebookWeight) and weight.row_scales is not None
        tensors = {
            "weight": pack_nibbles_low_first(weight.codes),
            "weight_scale": weight.scales.contiguous(),
            "weight_scale_2": weight.row_scales[0].clone(),
        }
        if self.static_input:
            assert weight.input_scales is not None
            inputs = exact_reciprocal(weight.input_scales.float(), shape, "input_scale")
            tensors["input_scale"] = inputs.reshape(())
        return tensors

    def describe(self) -> str:
        return f"nvfp4, activations {'fp4' if self.static_input else 'float'}"


@register_quantization("modelopt")
@dataclass(kw_only=True, eq=False)
class ModelOptConfig(QuantizationConfig):
    """hf_quant_config.json, or a `quantization_config` with quant_method modelopt.

    quant_algo, exclude_modules (ignore), kv_cache_quant_algo, and quantized_layers where quant_algo is MIXED_PRECISION.
    """

    quant_algo: str | None
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: Mapping[str, str] | None = None
    kv_cache: Any = None

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return ["hf_quant_config.json"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelOptConfig:
        settings = config.get("quantization", config)
        if not isinstance(settings, Mapping):
            raise _unsupported("quantization", settings, "an object")
        named = settings.get("quant_algo")
        algo = read_choice(
            "ModelOpt",
            {"quant_algo": named.upper() if isinstance(named, str) else named},  # fp8_pb_wo is written small
            "quant_algo",
            None,
            [*ALGORITHMS, "MIXED_PRECISION"],
        )
        read_choice("ModelOpt", settings, "group_size", GROUP, [GROUP, None])
        layers = None
        if algo == "MIXED_PRECISION":
            layers = _read_layers(settings.get("quantized_layers"))
        excluded = (*read_names(settings, "exclude_modules"), *read_names(settings, "ignore"))
        return cls(
            quant_algo=algo,
            exclude_modules=excluded,
            quantized_layers=layers,
            kv_cache=settings.get("kv_cache_quant_algo", config.get("kv_cache_scheme")),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if self.is_excluded(prefix) or not self.covers(layer, prefix, "weight_scale"):
            return None
        algo = self.quant_algo if self.quantized_layers is None else self.quantized_layers.get(prefix)
        if algo is None:
            return None
        # Without headers, as the algorithm says; with them, as the layer has it.
        static = f"{prefix}.input_scale" in self.stored if self.stored else algo != "W4A16_NVFP4"
        if algo == "FP8":
            return NamedFp8LinearMethod(TENSOR, "static" if static else "float", format="modelopt")
        if algo == "FP8_PER_CHANNEL_PER_TOKEN":
            return NamedFp8LinearMethod(CHANNEL, "token", format="modelopt", flat_scale=True)
        if algo == "FP8_PB_WO":
            return NamedFp8LinearMethod((BLOCK, BLOCK), "float", format="modelopt", spaced_scale=True)
        return NVFP4LinearMethod(static)

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """Read kv_cache_quant_algo, which names an algorithm, or the object kv_cache_scheme that config.json has."""
        if not isinstance(self.kv_cache, str):
            return read_kv_scheme(self.kv_cache)
        if self.kv_cache not in KV_ALGORITHMS:
            raise unsupported_kv_cache("kv_cache_quant_algo", self.kv_cache, " or ".join(KV_ALGORITHMS))
        return QuantizedKVCacheMethod(KV_ALGORITHMS[self.kv_cache])

    def is_excluded(self, prefix: str) -> bool:
        """Tell whether exclude_modules names the layer, or a module around it, by name or with shell wildcards."""
        return any(
            fnmatch.fnmatchcase(prefix, pattern) or prefix.startswith(f"{pattern}.")
            for pattern in self.exclude_modules
        )

    def skip_reason(self, tensor: str) -> str | None:
        return unused_kv_tensor(tensor)


def _read_layers(layers: Any) -> dict[str, str]:
    """Read the algorithm of each layer of `quantized_layers`, by the layer's name."""
    if not isinstance(layers, Mapping):
        raise _unsupported("quantized_layers", layers, "an object of layers, for MIXED_PRECISION")
    algorithms = {}
    for name, settings in layers.items():
        within = f"quantization_config.quantized_layers.{name}."
        algo = settings.get("quant_algo") if isinstance(settings, Mapping) else None
        algo = algo.upper() if isinstance(algo, str) else algo
        if algo not in ALGORITHMS:
            raise _unsupported("quant_algo", algo, " or ".join(ALGORITHMS), within=within)
        if settings.get("group_size", GROUP) not in (GROUP, None):
            raise _unsupported("group_size", settings["group_size"], str(GROUP), within=within)
        algorithms[name] = algo
    return algorithms


@register_quantization("nvfp4")
class NVFP4Config(ModelOptConfig):
    """The name of NVFP4 as a rule's target.  In checkpoints it is quant_method modelopt, or compressed-tensors."""

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NVFP4Config:
        raise unsupported(
            "NVFP4",
            "quant_method",
            "nvfp4",
            "modelopt, or compressed-tensors with format nvfp4-pack-quantized",
        )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        parse_options("nvfp4", options, {})
        return NVFP4LinearMethod()
