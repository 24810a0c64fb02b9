"""FP8 e4m3 under `quant_method: fp8`: DeepSeek's and transformers' block scales, and a scale a tensor or channel.

    weight            float8_e4m3fn [O, I]
    weight_scale_inv  float32 [ceil(O/128), ceil(I/128)]     with weight_block_size (despite its name, it multiplies)
    weight_scale      float32 [1] or [O, 1]                  without
    input_scale       float32 [1]                            with activation_scheme static

w = weight * scale; where `weight_scale_semantics` is inverse, as GPTQModel writes it, w = weight / scale. The page with
the layouts: quantization/fp8/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations, CanonicalWeight, Fp8Weight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    read_kv_scheme,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import needs_calibration, one_of, parse_options
from pymllm.quantization.storage.fields import is_block, is_skipped, read_names, read_stored, unsupported
from pymllm.quantization.storage.fp8_linear import E4M3LinearMethod
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import (
    GPTQMODEL,
    KV_SCHEME,
    REFUSED,
    RUNNING,
    STORED_DTYPE,
    STORED_LAYER,
    SWITCH,
)
from pymllm.weights.report import Skip
from pymllm.weights.spec import FLOATS, OUT, Dim, LinearShape

_unsupported = functools.partial(unsupported, "FP8")

IGNORED = ("modules_to_not_convert", "ignored_layers")
SCALES = ("weight_scale_inv", "weight_scale")
# activation_scheme -> how activations are rounded beside scales of blocks, and beside one of a tensor or channel.
ACTIVATIONS: dict[Any, tuple[Activations, Activations]] = {
    "dynamic": ("group", "token"),
    "static": ("static", "static"),
    "float": ("float", "float"),
}


@dataclass(frozen=True)
class Fp8LinearMethod(E4M3LinearMethod):
    """FP8 weights as DeepSeek, transformers and AutoFP8 name their tensors.  The fields are `E4M3LinearMethod`'s.

    inverse: whether codes are divided by the stored scale.  flat_scale: whether channels' scales are stored as [O].
    """

    block: tuple[int, int] = CHANNEL
    activations: Activations = "token"
    inverse: bool = field(default=False, kw_only=True)
    flat_scale: bool = field(default=False, kw_only=True)
    name: ClassVar[str] = "fp8"
    input_scale_names: ClassVar[tuple[str, ...]] = ("input_scale", "activation_scale")
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (*FLOATS, torch.float8_e8m0fnu)

    @property
    def scale_names(self) -> tuple[str, ...]:
        return SCALES[::-1] if self.block in (TENSOR, CHANNEL) else SCALES

    @property
    def scale_dims(self) -> tuple[Dim, ...]:
        return (OUT,) if self.flat_scale else super().scale_dims

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        if self.inverse:
            name = self.scale_names[0]
            tensors = {**tensors, name: tensors[name].float().reciprocal()}
        return super().to_canonical(tensors, shape)

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        if self.activations == "static":
            raise needs_calibration(self.describe(), shape)
        return Fp8Weight.from_float(weight, block=self.block, activations=self.activations)

    def describe(self) -> str:
        return super().describe().removeprefix("fp8 ") + (", scales divide" if self.inverse else "")


E4M3_NAMES = ("e4m3", "e4m3fn", "float8_e4m3", "float8_e4m3fn", "fp8_e4m3")
HARMLESS = {
    **GPTQMODEL,
    **below("kv_cache_scheme", KV_SCHEME),
    **harmless("weights are e4m3", "fmt format checkpoint_format", only=E4M3_NAMES),
    **harmless("experts are as other layers", "expert_dtype", only=("fp8", "float8_e4m3fn")),
    **harmless(STORED_DTYPE, "scale_fmt", only=("ue8m0", "float", "float32")),
    **harmless(STORED_LAYER, "modules_to_convert"),
    **harmless(RUNNING, "dequantize", only=SWITCH),
    **harmless("weight_block_size says so, too", "weight_per_tensor act_per_tensor", only=(False,)),
    **harmless(
        "the shape of the scales says so, too", "weight_scale_method", only=("block", "row", "tensor")
    ),
    **harmless("codes are bytes", "bits", only=(8,)),
    **harmless("weight_block_size has the groups", "group_size", only=(-1,)),
    **harmless("inputs are in order", "desc_act", only=(False,)),
    **harmless("float8 has no zero points", "sym", only=(True,)),
    **harmless("quant_method says so, too", "method", only=("fp8",)),
    **harmless("float8 is not packed in words", "pack_dtype"),
    **below(
        "dynamic.*",
        harmless(
            f"settings of single layers, {REFUSED}", "bits group_size format fmt weight_block_size", only=()
        ),
        harmless(
            f"settings of single layers, {REFUSED}", "weight_scale_method weight_scale_semantics", only=()
        ),
    ),
}


@register_quantization("fp8")
@dataclass(kw_only=True, eq=False)
class Fp8Config(QuantizationConfig):
    """`quantization_config` with quant_method fp8: weight_block_size, activation_scheme, modules_to_not_convert.

    block: the (outputs, inputs) of weight_block_size, or None: a scale for the tensor or each channel, as stored.
    inverse: whether codes are to be divided by their scale.
    """

    block: tuple[int, int] | None
    inverse: bool = False
    activation_scheme: str = "dynamic"
    modules_to_not_convert: tuple[str, ...] = ()
    kv_cache_scheme: Any = None
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Fp8Config:
        semantics = config.get("weight_scale_semantics") or "multiply"
        if semantics not in ("multiply", "inverse"):
            raise _unsupported("weight_scale_semantics", semantics, "multiply or inverse")
        # GPTQModel, which alone writes the semantics, leaves activations in floats.
        default = "float" if config.get("weight_scale_semantics") else "dynamic"
        scheme = config.get("activation_scheme", default)
        if "activation_scheme" in config and scheme not in ("dynamic", "static"):
            raise _unsupported("activation_scheme", scheme, "dynamic or static")
        block = config.get("weight_block_size")
        if block is not None and not is_block(block):
            raise _unsupported("weight_block_size", block, "null or two positive integers")
        ignored = tuple(name for field in IGNORED for name in read_names(config, field, regex=""))
        return cls(
            block=None if block is None else (block[0], block[1]),
            inverse=semantics == "inverse",
            activation_scheme=scheme,
            modules_to_not_convert=ignored,
            kv_cache_scheme=config.get("kv_cache_scheme"),
        )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        values = parse_options(
            "fp8",
            options,
            {
                "granularity": one_of("tensor", "channel", "block"),
                "activations": one_of("float", "token", "tensor", "group", "static"),
            },
        )
        granularity = values.get("granularity", "channel")
        block = {"tensor": TENSOR, "channel": CHANNEL, "block": (128, 128)}[granularity]
        return Fp8LinearMethod(
            block, values.get("activations", "group" if granularity == "block" else "token")
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = is_skipped(self.spellings(prefix), self.modules_to_not_convert)
        if not self.covers(layer, prefix, *SCALES, excluded=excluded):
            return None
        blocks, rows = ACTIVATIONS[self.activation_scheme]
        stored = self.stored.get(f"{prefix}.weight_scale", self.stored.get(f"{prefix}.weight_scale_inv"))
        in_bytes = stored is not None and stored.dtype is torch.uint8
        if self.block is not None:
            return Fp8LinearMethod(self.block, blocks, in_bytes, inverse=self.inverse)
        per_channel = stored is not None and math.prod(stored.shape) > 1
        block, flat = (
            CHANNEL if per_channel else TENSOR,
            stored is not None and per_channel and len(stored.shape) == 1,
        )
        return Fp8LinearMethod(block, rows, in_bytes, inverse=self.inverse, flat_scale=flat)

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """Read `kv_cache_scheme`, which AutoFP8 writes as "static" and others as an object."""
        scheme = self.kv_cache_scheme
        return QuantizedKVCacheMethod("fp8") if scheme == "static" else read_kv_scheme(scheme)

    def skip_reason(self, tensor: str) -> Skip | str | None:
        """Return why a tensor may be skipped, and the proof, or None.

        transformers keeps a weight in floats that blocks do not divide, and still writes a scale that it never set.
        """
        prefix, _, suffix = tensor.rpartition(".")
        reason = "a scale of a weight that is stored in floats, which has none"
        if suffix in SCALES and self.stored_as_float(prefix):
            return Skip(reason, functools.partial(_refuse_codes, self.stored[f"{prefix}.weight"]))
        if suffix in Fp8LinearMethod.input_scale_names and self.stored_as_float(prefix):
            return reason
        return None


def _refuse_codes(weight: Any, scale: Tensor) -> str | None:
    """Return that floats are codes to be multiplied with their scale, or None: weights are not all e4m3 numbers."""
    values = read_stored(weight)
    if bool((scale.float() == 1).all()) or not bool(
        (values == values.to(torch.float8_e4m3fn).to(values.dtype)).all()
    ):
        return None
    return "a scale other than 1 of a weight whose floats are all e4m3 numbers, as codes are"
