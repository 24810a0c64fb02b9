"""ModelOpt's spellings of NVFP4, FP8, the MX formats and integers.  As the target of a rule, NVFP4 is `nvfp4`.

NVFP4 (`quant_algo` NVFP4, W4A16_NVFP4, W4A8_NVFP4_FP8, NVFP4_AWQ):

    weight          uint8 [O, I/2]           two E2M1 codes a byte, the low nibble first
    weight_scale    float8_e4m3fn [O, I/16]
    weight_scale_2  float32 []               a second scale, which multiplies too
    input_scale     float32 []               the same for activations, in 4 bits (W4A4) or fp8 (W4A8)

w = E2M1[code] * (weight_scale * weight_scale_2).

The FP8 algorithms have weight float8_e4m3fn [O, I] and

    FP8                        weight_scale [], input_scale []
    FP8_PER_CHANNEL_PER_TOKEN  weight_scale [O]
    FP8_PB_WO, FP8_PB_REAL     weight_scale [O/128, 1, I/128, 1], or [O/128, I/128], or [] for a weight of one block

MXFP8 is `storage/mxfp8_linear.py`, MXFP4 and W4A8_MXFP4_FP8 `storage/mxfp4_linear.py`; the integers (W4A16_AWQ,
W4A8_AWQ, W8A16, W8A8_SQ_PER_CHANNEL) are `storage/modelopt_linear.py`. A layer with a `pre_quant_scale`, which
multiplies its inputs as the model runs, is refused by name.

The page with the layouts: quantization/modelopt/README.md.
"""

# I in_features, O out_features, P parts of a fused layer

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CHANNEL, E4M3_MAX, TENSOR, Activations, CanonicalWeight, CodebookWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    read_kv_scheme,
    unsupported_kv_cache,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.storage.fields import compile_wildcards, is_group_size, read_names, unsupported
from pymllm.quantization.storage.fp4_linear import e2m1_weight, exact_reciprocal
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.quantization.storage.groups import check_groups, check_share, rows_of_parts
from pymllm.quantization.storage.modelopt_linear import ModelOptIntLinearMethod
from pymllm.quantization.storage.mxfp4_linear import stored_mxfp4
from pymllm.quantization.storage.mxfp8_linear import stored_mxfp8
from pymllm.quantization.storage.packing import encode_e2m1, pack_nibbles_low_first, unpack_nibbles_low_first
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import KV_SCHEME, SWITCH, WRITER
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec

_unsupported = functools.partial(unsupported, "ModelOpt")

GROUP = 16
LARGEST = 6.0  # the largest value of E2M1
E4M3 = torch.float8_e4m3fn
# How many inputs may share a scale, the usual number first; None: any number; none at all: there are no groups.
GROUPS: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"), (GROUP,)),
    "W4A8_NVFP4_FP8": (32, GROUP),
    **dict.fromkeys(("MXFP8", "MXFP4", "W4A8_MXFP4_FP8"), (32,)),
    **dict.fromkeys(("W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ"), None),
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL"), ()),
    **dict.fromkeys(("W8A16", "INT8_WO", "W8A8_SQ_PER_CHANNEL", "INT8_SQ"), ()),
}
# Those whose layers have an input_scale, where no headers tell.
STATIC_INPUTS = (
    "NVFP4",
    "NVFP4_AWQ",
    "W4A8_NVFP4_FP8",
    "W4A8_MXFP4_FP8",
    "FP8",
    "W4A8_AWQ",
    "W8A8_SQ_PER_CHANNEL",
    "INT8_SQ",
)
BLOCK = 128  # both sides of a block of FP8_PB_WO
Algorithm = tuple[str, int]  # a key of GROUPS, and how many inputs share a scale; 0: no groups, or whole rows
KV_ALGORITHMS: dict[str, Literal["fp8", "int8"]] = {"FP8": "fp8", "INT8": "int8"}


@dataclass(frozen=True)
class NVFP4LinearMethod(LinearMethodBase):
    """NVFP4 weights.

    static_input: whether the checkpoint has an `input_scale`.  fp8_input: it is for activations in fp8, not 4 bits.
    group_size: how many inputs share a scale.
    """

    static_input: bool = False
    fp8_input: bool = False
    group_size: int = GROUP
    name: ClassVar[str] = "nvfp4"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        specs: tuple[WeightSpec, ...] = (
            WeightSpec("weight", torch.uint8, (OUT, IN.packed(2))),
            # A block of zeros may have the scale zero.
            WeightSpec("weight_scale", E4M3, (OUT, IN.every(self.group_size)), scale="or zero"),
            WeightSpec("weight_scale_2", torch.float32, (PART,), accepts=FLOATS, scale=True),
        )
        if self.static_input:
            specs += (WeightSpec("input_scale", torch.float32, (PART,), accepts=FLOATS, scale=True),)
        return specs

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape, what="NVFP4 blocks")
        check_share(self.group_size, shape, what="blocks")

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        activations: Activations = "float"
        scale = tensors.get("input_scale")
        if scale is not None:
            activations = "static fp8" if self.fp8_input else "group"
            # The file holds what to multiply codes with, the canonical weight of fp4 codes its reciprocal.
            scale = scale if self.fp8_input else scale.reciprocal()
        return e2m1_weight(
            unpack_nibbles_low_first(tensors["weight"]),
            tensors["weight_scale"],
            rows_of_parts(tensors["weight_scale_2"], shape),
            activations,
            scale,
        )

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Round a float weight [O, I] so that every block's peak becomes 6, and every part's largest scale 448."""
        group = min(self.group_size, weight.shape[1])
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
        element = "fp8" if self.fp8_input else "fp4"
        return f"nvfp4, activations {element if self.static_input else 'float'}"


_LAYER = harmless("the algorithms that are read have none", "has_zero_point pre_quant_scale", only=(False,))
_CODES = {  # what quant_algo means, said again in compressed-tensors' words
    **harmless("quant_algo says so", "type", only=("float", "int")),
    **harmless("quant_algo says so", "num_bits", only=(4, 8)),
    **harmless("quant_algo says so", "group_size"),
    **harmless("quant_algo says so", "symmetric", only=(True,)),
    **harmless("quant_algo says so", "strategy"),
}
_GROUP = {
    **below("weights input_activations", _CODES),
    **harmless("quant_algo says so", "weights.dynamic", only=(False,)),
    **harmless("quant_algo says so", "input_activations.dynamic", only=SWITCH),
}
HARMLESS = {
    **harmless(WRITER, "producer.name producer.version producer.commit"),
    **_LAYER,
    **_GROUP,
    **below("quantization quantization.quantized_layers.* quantized_layers.* config_groups.*", _LAYER),
    **below(
        "config_groups.*", _GROUP, harmless("quant_algo and quantized_layers say which layers", "targets")
    ),
    **harmless("a layer's own tensor of that name says so", "config_groups.*.pre_quant_scale", only=SWITCH),
    **below("kv_cache_scheme", KV_SCHEME),
}


@register_quantization("modelopt")
@dataclass(kw_only=True, eq=False)
class ModelOptConfig(QuantizationConfig):
    """hf_quant_config.json, or a `quantization_config` with quant_method modelopt.

    algorithm: of all layers, or None where quant_algo is MIXED_PRECISION.  layers: those of `quantized_layers`, by the
    name or pattern of a layer or a module around it.  exclude_modules: also called ignore.  kv_cache: an algorithm, or
    a kv_cache_scheme.
    """

    algorithm: Algorithm | None
    exclude_modules: tuple[str, ...] = ()
    layers: Mapping[str, Algorithm] = field(default_factory=dict)
    kv_cache: Any = None
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return ["hf_quant_config.json"]

    def settings_beside(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the settings that hf_quant_config.json has in an object of their own."""
        inner = settings.get("quantization", settings)
        return super().settings_beside(name, inner if isinstance(inner, Mapping) else {"quantization": inner})

    def means_the_same(self, other: ModelOptConfig) -> bool:
        """Compare the algorithms of weights, and of the KV cache, which has two spellings, where both say one."""
        layers = self.layers.keys() & other.layers.keys()  # of a layer in one list alone the tensors tell
        told = [config for config in (self, other) if config.kv_cache is not None]
        caches = {config.get_kv_cache_method(nn.Module(), "") for config in told}
        alike = all(self.layers[name] == other.layers[name] for name in layers)
        return self.algorithm == other.algorithm and alike and len(caches) < 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelOptConfig:
        settings = config.get("quantization", config)
        if not isinstance(settings, Mapping):
            raise _unsupported("quantization", settings, "an object")
        mixed = str(settings.get("quant_algo")).upper() == "MIXED_PRECISION"
        excluded = (*read_names(settings, "exclude_modules"), *read_names(settings, "ignore"))
        return cls(
            algorithm=None if mixed else _read_algorithm(settings, "quantization_config."),
            exclude_modules=excluded,
            layers=_read_layers(settings.get("quantized_layers"), settings.get("group_size"))
            if mixed
            else {},
            kv_cache=settings.get("kv_cache_quant_algo", config.get("kv_cache_scheme")),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        found = self.algorithm or self._layer_algorithm(prefix)
        excluded = self.is_excluded(prefix) or found is None
        if not self.covers(layer, prefix, "weight_scale", excluded=excluded):
            return None
        self._refuse_smoothing(prefix)
        said = None if excluded or found is None else self._method(prefix, *found)
        if said is not None and self.algorithm is not None:
            return said
        algorithms = dict.fromkeys((self.algorithm, *self.layers.values()))
        return self.as_stored(layer, prefix, said, (self._method(prefix, *a) for a in algorithms if a))

    def _layer_algorithm(self, prefix: str) -> Algorithm | None:
        """Find a layer's algorithm of MIXED_PRECISION: by its name, else by a pattern or a module around it."""
        names = self.spellings(prefix)
        exact = (self.layers[name] for name in names if name in self.layers)
        found = (self.layers[key] for key in self.layers if any(_means(key, name) for name in names))
        return next(exact, None) or next(found, None)

    def _refuse_smoothing(self, prefix: str) -> None:
        """Raise ConfigError for a layer whose inputs are multiplied by a stored factor each, as AWQ leaves them."""
        if f"{prefix}.pre_quant_scale" in self.stored:
            raise ConfigError(
                "ModelOpt's pre_quant_scale multiplies the layer's inputs as the model runs, which is not implemented",
                code="quantization-config",
                tensor=f"{prefix}.pre_quant_scale",
                expected="a layer without it: the exporter folds it into the layer before where it can",
                fix="Export the model with an algorithm that does not smooth activations, such as NVFP4 or FP8.",
            )

    def _method(self, prefix: str, algo: str, group_size: int) -> LinearMethodBase:
        # Without headers, as the algorithm says; with them, as the layer has it.
        static = f"{prefix}.input_scale" in self.stored if self.stored else algo in STATIC_INPUTS
        if algo in ("W4A16_AWQ", "INT4_AWQ", "W4A8_AWQ"):
            second = f"{prefix}.weight_scale_2" in self.stored
            return ModelOptIntLinearMethod(4, group_size, "static fp8" if static else "float", second)
        if algo in ("W8A16", "INT8_WO", "W8A8_SQ_PER_CHANNEL", "INT8_SQ"):
            return ModelOptIntLinearMethod(8, 0, "static" if static else "float")
        if algo == "MXFP8":
            return stored_mxfp8(self.stored, prefix, "ModelOpt", "group mx")
        if algo == "MXFP4":
            return stored_mxfp4(self.stored, prefix, "ModelOpt", "group")
        if algo == "W4A8_MXFP4_FP8":
            return stored_mxfp4(self.stored, prefix, "ModelOpt", "static fp8" if static else "float")
        if algo == "FP8":
            return NamedFp8LinearMethod(TENSOR, "static" if static else "float", format="modelopt")
        if algo == "FP8_PER_CHANNEL_PER_TOKEN":
            return NamedFp8LinearMethod(CHANNEL, "token", format="modelopt", flat_scale=True)
        if algo in ("FP8_PB_WO", "FP8_PB_REAL"):
            return self._block_method(prefix)
        return NVFP4LinearMethod(static, static and algo == "W4A8_NVFP4_FP8", group_size)

    def _block_method(self, prefix: str) -> LinearMethodBase:
        """Make the method of blocks of 128 x 128 as the scales are stored: with four axes, two, or none."""
        scale, weight = (self.stored.get(f"{prefix}.{name}") for name in ("weight_scale", "weight"))
        axes = 4 if scale is None else len(scale.shape)
        if axes < 2 and weight is not None and all(side <= BLOCK for side in weight.shape):
            return NamedFp8LinearMethod(TENSOR, "float", format="modelopt")  # the weight is one block
        return NamedFp8LinearMethod((BLOCK, BLOCK), "float", format="modelopt", spaced_scale=axes != 2)

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
            _means(pattern, name) for pattern in self.exclude_modules for name in self.spellings(prefix)
        )


def _means(pattern: str, prefix: str) -> bool:
    """Tell whether a name, perhaps with shell wildcards, is the layer's, or that of a module around it."""
    return compile_wildcards(pattern, "exclude_modules").fullmatch(prefix) is not None or prefix.startswith(
        f"{pattern}."
    )


def _read_algorithm(settings: Any, within: str, group_size: Any = None) -> Algorithm:
    """Read quant_algo and group_size.

    within: the path of these settings, with its dot, for messages.  group_size: that of layers which have none.
    """
    named = settings.get("quant_algo") if isinstance(settings, Mapping) else settings
    algo = named.upper() if isinstance(named, str) else named  # fp8_pb_wo is written small
    if not isinstance(algo, str) or algo not in GROUPS:
        known = " or ".join((*GROUPS, "MIXED_PRECISION") if within == "quantization_config." else GROUPS)
        raise _unsupported("quant_algo", named, known, within=within)
    if settings.get("has_zero_point"):
        raise _unsupported("has_zero_point", settings["has_zero_point"], "false", within=within)
    # AWQ's layers may have a pre_quant_scale: those that do have a tensor of that name.
    smoothed = settings.get("pre_quant_scale")
    if smoothed not in ((True, False, None) if algo.endswith("AWQ") else (False, None)):
        raise _unsupported("pre_quant_scale", smoothed, "true (of AWQ alone) or false", within=within)
    size, expected = settings.get("group_size", group_size), GROUPS[algo]
    if expected is None:
        size = 128 if size is None else size
        if not is_group_size(size):
            raise _unsupported("group_size", size, "a positive integer, or -1 (whole rows)", within=within)
        return algo, max(size, 0)
    if expected and size not in (*expected, None):
        raise _unsupported("group_size", size, " or ".join(map(str, expected)), within=within)
    return algo, (size or expected[0]) if expected else 0


def _read_layers(layers: Any, group_size: Any) -> dict[str, Algorithm]:
    """Read the algorithm of each layer of `quantized_layers`, by the layer's name.

    group_size: of the algorithms with groups, where a layer has none of its own.
    """
    if not isinstance(layers, Mapping):
        raise _unsupported("quantized_layers", layers, "an object of layers, for MIXED_PRECISION")
    return {
        name: _read_algorithm(settings, f"quantization_config.quantized_layers.{name}.", group_size)
        for name, settings in layers.items()
    }


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
