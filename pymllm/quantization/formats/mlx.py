"""MLX, as `mlx.core.quantize` makes weights and mlx-lm stores them: affine codes, MXFP4, MXFP8 and NVFP4.

    weight        uint32 [O, I·bits/32]  codes along the inputs, lowest bits first, of 3, 5, 6 bits also across words
    scales        [O, I/G]               affine: floats; mxfp4, mxfp8: uint8 exponents; nvfp4: e4m3 in uint8
    biases        float [O, I/G]         affine alone: w = code * scale + bias
    global_scale  float32 []             nvfp4, of some layers: w = E2M1[code] * scale * global_scale / 2688

The config is `quantization` in config.json, and often a second time `quantization_config`. The page with the layout:
quantization/mlx/README.md. As the target of a rule: `mlx:bits=4,group_size=64`, `mlx:mode=mxfp4`.
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, counted
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, Fp8Weight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase, StoredTensor
from pymllm.quantization.options import one_of, parse_options
from pymllm.quantization.rounding.mlx import round_affine, round_e2m1, round_e4m3
from pymllm.quantization.storage.fields import unsupported
from pymllm.quantization.storage.fp4_linear import e2m1_weight
from pymllm.quantization.storage.groups import check_groups, check_share, group_within, rows_of_parts
from pymllm.quantization.storage.packing import (
    pack_words,
    refuse_nan_codes,
    refuse_nan_scales,
    unpack_fields,
    unpack_words,
)
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import SWITCH
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec

WITHIN = "quantization."
_unsupported = functools.partial(unsupported, "MLX", within=WITHIN)

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
# (bits, group size) where the config does not say; the other modes have no other.
DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
SCALE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
GLOBAL_UNIT = 448.0 * 6.0  # a global scale is the tensor's peak: the largest scale times the largest code


@dataclass(frozen=True)
class MLXLinearMethod(LinearMethodBase):
    """MLX's weights.

    mode: affine, mxfp4, mxfp8 or nvfp4.  group_size: how many inputs share a scale.
    scale_dtype: of affine scales and biases; None: that of the weight which is quantised, as MLX chooses it, or of the
    layer's floats where the weight was widened to float32.
    global_scale: whether there is a second scale, of the whole tensor.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"
    scale_dtype: torch.dtype | None = None
    global_scale: bool = False
    name: ClassVar[str] = "mlx"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups = (OUT, IN.every(self.group_size))
        codes = (OUT, IN.in_words(self.bits))
        if self.mode == "affine":
            # Not declared scales, as these must not be zero: a group of equal values may have the scale zero.
            dtype = self.scale_dtype or torch.float32
            return (
                WeightSpec("weight", torch.uint32, codes),
                WeightSpec("scales", dtype, groups, accepts=FLOATS, refuse=_refuse_infinite),
                WeightSpec("biases", dtype, groups, accepts=FLOATS, refuse=_refuse_infinite),
            )
        specs = (
            WeightSpec("weight", torch.uint32, codes, refuse=_refuse_words if self.mode == "mxfp8" else None),
            WeightSpec("scales", torch.uint8, groups, refuse=self._refuse_scales),
        )
        if not self.global_scale:
            return specs
        return *specs, WeightSpec("global_scale", torch.float32, (PART,), accepts=FLOATS, scale=True)

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape, what="MLX groups")
        check_share(self.group_size, shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        words, scales = tensors["weight"].view(torch.int32), tensors["scales"].contiguous()
        if self.mode == "mxfp8":
            codes = unpack_fields(words, 8).view(E4M3)
            sizes = [span.size for span in shape.outputs]
            block = (1, self.group_size)
            return Fp8Weight.from_parts(codes, scales.view(E8M0).float(), block, sizes, "float", None)
        codes = unpack_words(words, self.bits)[:, : shape.in_features_local].contiguous()
        if self.mode == "affine":
            # A rank that holds a part of one group has that group alone, of the size that it holds.
            group_size = codes.shape[1] // scales.shape[1]
            return IntWeight(
                codes, scales, None, self.bits, group_size, offsets=tensors["biases"].contiguous()
            )
        if self.mode == "mxfp4":
            return e2m1_weight(codes, scales.view(E8M0))
        rows = None
        if self.global_scale:
            rows = rows_of_parts(tensors["global_scale"] / GLOBAL_UNIT, shape)
        return e2m1_weight(codes, scales.view(E4M3), rows)

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Round a float weight [O, I] as `mlx.core.quantize` does on a CPU: the same codes, scales and biases."""
        groups = weight.unflatten(1, (-1, group_within(self.group_size, weight.shape[1])))  # [O, I/G, G]
        if self.mode == "affine":
            codes, scales, biases = round_affine(groups, self.bits)
            dtype = self.scale_dtype or (shape.dtype if weight.dtype is torch.float32 else weight.dtype)
            return IntWeight(
                codes.flatten(1), scales.to(dtype), None, self.bits, groups.shape[2], offsets=biases.to(dtype)
            )
        if self.mode == "mxfp8":
            codes, scales = round_e4m3(groups)
            return Fp8Weight(codes.flatten(1), scales.float(), (1, groups.shape[2]))
        codes, scales = round_e2m1(groups, E4M3 if self.mode == "nvfp4" else E8M0)
        return e2m1_weight(codes.flatten(1), scales)

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        if isinstance(weight, IntWeight):
            dtype = self.scale_dtype or weight.scales.dtype
            words = pack_words(weight.codes, weight.bits)
            offsets = offsets_of(weight)
            return {
                "weight": words.view(torch.uint32),
                "scales": weight.scales.to(dtype).contiguous(),
                "biases": offsets.to(dtype).contiguous(),
            }
        if isinstance(weight, Fp8Weight):
            words = weight.weight.contiguous().view(torch.uint32)
            return {"weight": words, "scales": weight.scales.to(E8M0).view(torch.uint8).contiguous()}
        assert isinstance(weight, CodebookWeight) and weight.row_scales is None
        words = pack_words(weight.codes, 4).view(torch.uint32)
        return {"weight": words, "scales": weight.scales.view(torch.uint8).contiguous()}

    def describe(self) -> str:
        kind = f"int{self.bits} g{self.group_size}" if self.mode == "affine" else self.mode
        return f"mlx {kind}{', global scale' if self.global_scale else ''}"

    def _refuse_scales(self, scales: Tensor, shape: object) -> str | None:
        """Refuse NaN among bytes that hold exponents, or e4m3."""
        return refuse_nan_scales(scales.view(E4M3 if self.mode == "nvfp4" else E8M0), shape)


def offsets_of(weight: IntWeight) -> Tensor:
    """Return what MLX adds to code * scale, [O, I/G] float: its biases, or those that zero points come to."""
    if weight.offsets is not None:
        return weight.offsets
    zeros = 2 ** (weight.bits - 1) if weight.zeros is None else weight.zeros.float()
    return -zeros * weight.scales.float()


def _refuse_infinite(values: Tensor, shape: object) -> str | None:
    """Refuse scales and biases that are NaN or infinite."""
    bad = values.numel() - int(torch.isfinite(values).sum())
    return f"{bad} of {counted(values.numel(), 'value')} that are NaN or infinite" if bad else None


def _refuse_words(words: Tensor, shape: object) -> str | None:
    """Refuse words that hold e4m3 codes which are NaN."""
    return refuse_nan_codes(words.contiguous().view(torch.uint8), shape)


HARMLESS = below(
    "*",
    harmless("the tensors show whether there is one", "global_scale", only=SWITCH),
    harmless("inputs stay floats", "quantize_input", only=(False,)),
)


@register_quantization("mlx")
@dataclass(kw_only=True, eq=False)
class MLXConfig(QuantizationConfig):
    """`quantization` of mlx-lm: bits, group_size, mode; and, by a layer's name, settings of its own, true or false.

    default: the method of layers that have no settings of their own.  layers: those of others; None: floats.
    What is stored decides: a layer is quantised where it has scales, and their shapes say how.
    """

    default: MLXLinearMethod
    layers: Mapping[str, MLXLinearMethod | None]
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def get_config_keys(cls) -> list[str]:
        return ["quantization"]

    @classmethod
    def claims(cls, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bool:
        ours = settings.get("quant_method") in (None, cls.get_name())
        if not ours or not ({"bits", "group_size", "mode"} & settings.keys()):
            return False
        scaled = (name.removesuffix(".scales") for name in tensors if name.endswith(".scales"))
        words = (tensors.get(f"{name}.weight") for name in scaled)
        return any(tensor is not None and tensor.dtype is torch.uint32 for tensor in words)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MLXConfig:
        layers: dict[str, MLXLinearMethod | None] = {}
        default = _read_settings(config, "")
        for name in config:
            if name in ("quant_method", "bits", "group_size", "mode"):
                continue
            value = config[name]
            if isinstance(value, Mapping):
                layers[name] = _read_settings(value, f"{name}.")
            elif isinstance(value, bool):
                layers[name] = default if value else None
            else:
                raise _unsupported(name, value, "a layer's name with an object of settings, true or false")
        return cls(default=default, layers=layers)

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Receive the headers.  ConfigError for a setting that is none of all layers, and no stored module's name."""
        super().see_checkpoint(tensors)
        modules = {name for module in self.stored_modules for name in self.spellings(module)}
        for name in self.layers:
            if not any(module == name or module.startswith(f"{name}.") for module in modules):
                raise _unsupported(
                    name,
                    "a layer's settings",
                    "bits, group_size, mode, or the name of a layer that is stored",
                )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        values = parse_options(
            "mlx",
            options,
            {"bits": int, "group_size": int, "mode": one_of(*DEFAULTS), "scales": one_of(*SCALE_DTYPES)},
        )
        scales = values.pop("scales", None)
        try:
            method = _read_settings(values, "")
            if scales is not None and method.mode != "affine":
                raise _unsupported(
                    "scales", scales, "no such option with this mode, whose scales have one dtype"
                )
        except ConfigError as error:
            said = ",".join(f"{key}={value}" for key, value in options.items())
            raise ConfigError(
                f"mlx cannot be made with {said}",
                code="bad-option",
                expected=error.expected,
                found=error.found,
            ) from None
        return replace(method, scale_dtype=SCALE_DTYPES.get(scales or ""))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        named = next(
            (self.layers[name] for name in self.spellings(prefix) if name in self.layers), self.default
        )
        scales, words = (self.stored.get(f"{prefix}.{suffix}") for suffix in ("scales", "weight"))
        if not self.stored:
            return named
        if scales is None:
            # Words without scales are quantised all the same: the scales will be named as missing.
            return named or self.default if words is not None and words.dtype is torch.uint32 else None
        shape = getattr(layer, "shape", None)
        inputs = int(getattr(layer, "in_features", 0) if shape is None else shape.in_features)
        found = _settle(named or self.default, scales, words, inputs)
        dtype = None
        if found.mode == "affine":
            biases = self.stored.get(f"{prefix}.biases")
            known = [t.dtype for t in (scales, biases) if t is not None and t.dtype in FLOATS]
            dtype = functools.reduce(torch.promote_types, known) if known else None
        second = f"{prefix}.global_scale" in self.stored
        return MLXLinearMethod(found.bits, found.group_size, found.mode, dtype, second)


def _settle(
    named: MLXLinearMethod, scales: StoredTensor, words: StoredTensor | None, inputs: int
) -> MLXLinearMethod:
    """Return the method that the stored shapes say, or `named`, the config's, where they say nothing or fit no method.

    inputs: the layer's input features; 0: they are not known.
    """
    count = scales.shape[-1] if scales.shape else 0
    if words is None or not words.shape or not count or words.shape[-1] * 32 % count:
        return named
    together = words.shape[-1] * 32 // count  # bits of a group's codes
    if scales.dtype is torch.uint8:
        fitting = (
            MLXLinearMethod(bits, size, mode)
            for mode, (bits, size) in DEFAULTS.items()
            if mode != "affine" and bits * size == together and inputs in (0, size * count)
        )
        return next(fitting, named)
    fits = named.mode == "affine" and named.bits * named.group_size == together
    if fits and inputs in (0, named.group_size * count):
        return named
    size = inputs // count
    if size and inputs % count == 0 and together % size == 0 and together // size in AFFINE_BITS:
        return MLXLinearMethod(together // size, size)
    return named


def _read_settings(config: Mapping[str, Any], at: str) -> MLXLinearMethod:
    """Read bits, group_size and mode.  at: the layer that they are of, with a dot; "": all.  ConfigError."""
    within = f"{WITHIN}{at}"
    mode = config.get("mode")
    mode = "affine" if mode is None else mode
    if not isinstance(mode, str) or mode not in DEFAULTS:
        raise _unsupported("mode", mode, " or ".join(DEFAULTS), within=within)
    bits, size = config.get("bits"), config.get("group_size")
    usual_bits, usual_size = DEFAULTS[mode]
    bits, size = usual_bits if bits is None else bits, usual_size if size is None else size
    allowed = AFFINE_BITS if mode == "affine" else (usual_bits,)
    if type(bits) is not int or bits not in allowed:
        raise _unsupported("bits", bits, f"{' or '.join(map(str, allowed))} with mode {mode}", within=within)
    fits = size > 0 if mode == "affine" and type(size) is int else size == usual_size
    if type(size) is not int or not fits:
        expected = "a positive integer" if mode == "affine" else f"{usual_size} with mode {mode}"
        raise _unsupported("group_size", size, expected, within=within)
    return MLXLinearMethod(bits, size, mode)
