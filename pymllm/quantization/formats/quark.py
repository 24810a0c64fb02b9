"""Quark (`quant_method: quark`): AMD's quantiser.  `dtype` and `qscheme` of a layer's `weight` say what it has:

    fp8_e4m3  per_tensor, per_channel, per_group, per_block
              weight float8_e4m3fn [O, I], weight_scale float [], [O], [O, I/G] or [O/b0, I/b1], input_scale []
    fp8_e4m3  per_group of 32 with scale_format e8m0: MXFP8 (`storage/mxfp8_linear.py`)
    fp4       per_group of 32 with scale_format e8m0: MXFP4 (`storage/mxfp4_linear.py`)
    int4, uint4, int8, uint8: `storage/quark_linear.py`

Other dtypes (mx, fp6, int2, int3), two-level weights and rotations of activations are refused by name. The page with
the layouts: quantization/quark/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    unsupported_kv_cache,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fields import (
    compile_pattern,
    compile_wildcards,
    is_block,
    read_names,
    unsupported,
)
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.quantization.storage.mxfp4_linear import MXFP4LinearMethod, stored_mxfp4
from pymllm.quantization.storage.mxfp8_linear import MXFP8LinearMethod, stored_mxfp8
from pymllm.quantization.storage.quark_linear import QuarkIntLinearMethod
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import CALIBRATION, PROCESS, REFUSED, STORED_DTYPE, WRITER

_unsupported = functools.partial(unsupported, "Quark")

INTEGERS = {"int4": (4, True), "uint4": (4, False), "int8": (8, True), "uint8": (8, False)}
DTYPES = ("fp8_e4m3", "fp4", *INTEGERS)
SCHEMES: dict[str, Literal["tensor", "channel", "group"]] = {
    "per_tensor": "tensor",
    "per_channel": "channel",
    "per_group": "group",
}
MX_GROUP = 32
ONLINE = (
    "r3",
    "r4",
    "online_r1_rotation",
    "online_config",
)  # settings of rotations that activations are to get


# Of a tensor's codes; then of a layer.
_SPEC = {
    **harmless(
        CALIBRATION, "observer_cls round_method scale_calculation_mode enable_buffer_reuse max_input_numel"
    ),
    **harmless(STORED_DTYPE, "scale_type scale_format zero_point_type"),
    **harmless("a channel is an output, or a token", "ch_axis", only=(0, 1, -1)),
    **harmless("float8 has no zero points", "symmetric", only=(True,)),
    **harmless("scales are not codes", "is_scale_quant", only=(False,)),
}
_SCHEME = {
    **below("weight input_tensors output_tensors", _SPEC),
    **harmless("a static scale is that of the tensor", "input_tensors.qscheme", only=("per_tensor",)),
    **harmless("activations share the groups of the weights", "input_tensors.group_size", only=(32, 128)),
    **below("output_tensors", harmless("read when the cache is made", "dtype qscheme is_dynamic")),
    **harmless(PROCESS, "target_device"),
}
_ALGORITHM = {
    **harmless(
        "an algorithm that changes weights alone",
        "name scaling_layers model_decoder_layers inside_layer_modules alpha beta block_size damp_percent desc_act",
        "static_groups scale_clamp_min compute_scale_loss iters lr minmax_lr enable_minmax_tuning batch_size",
        "r1 r2 rotation_size random random2 random_r1 random_r2 backbone v_proj o_proj self_attn mlp",
        "trainable train_smooth smooth_positions",
    ),
    **harmless(f"activations are rotated, {REFUSED}", "r3 r4 online_r1_rotation", only=(False,)),
    **harmless(f"activations are rotated, {REFUSED}", "online_config", only=()),
}
HARMLESS = {
    **below(
        "global_quant_config layer_quant_config.* layer_type_quant_config.* kv_cache_quant_config.*", _SCHEME
    ),
    **below("kv_cache_quant_config.*", harmless("layer_quant_config has them, too", "weight input_tensors")),
    **below("algo_config algo_config.*", _ALGORITHM),
    **harmless("all linear layers have a scheme by their type", "global_quant_config"),
    **harmless(WRITER, "version"),
    **harmless(PROCESS, "quant_mode quant_flow gpu_resident_blocks keep_prequantized_layers"),
    **harmless(CALIBRATION, "min_kv_scale export.min_kv_scale export.weight_merge_groups"),
    **harmless(CALIBRATION, "shared_scale_groups sync_moe_expert_input_amax"),
    **harmless(f"keys are rounded before they are rotated, {REFUSED}", "kv_cache_post_rope", only=(False,)),
    **harmless(f"a softmax is rounded while the model runs, {REFUSED}", "softmax_quant_spec", only=()),
}


@register_quantization("quark")
@dataclass(kw_only=True, eq=False)
class QuarkConfig(QuantizationConfig):
    """`quantization_config` of Quark: global_quant_config, layer_quant_config, layer_type_quant_config, exclude.

    common: the method of all layers, but for those that a pattern of `layers` names; None: not quantised.
    reorder: how 4-bit codes lie in words.
    kv_cache: how keys and values are to be stored, as the config has it, or None.
    """

    common: LinearMethodBase | None
    layers: Mapping[str, LinearMethodBase | None]
    reorder: bool = True
    exclude: tuple[str, ...] = ()
    kv_cache: Any = None
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuarkConfig:
        export = config.get("export")
        pack = export.get("pack_method", "reorder") if isinstance(export, Mapping) else "reorder"
        stored = (
            export.get("weight_format", "real_quantized") if isinstance(export, Mapping) else "real_quantized"
        )
        if stored != "real_quantized" or pack not in ("reorder", "order"):
            raise _unsupported("export", export, "weight_format real_quantized")
        _refuse_rotations(config.get("algo_config"))
        layers = config.get("layer_quant_config") or {}
        by_type = config.get("layer_type_quant_config") or {}
        if not isinstance(layers, Mapping):
            raise _unsupported("layer_quant_config", layers, "an object of layer patterns")
        if not isinstance(by_type, Mapping) or set(by_type) - {"Linear"}:
            raise _unsupported("layer_type_quant_config", by_type, "an object with no key but Linear")
        if "Linear" in by_type:
            common = _read_scheme(by_type["Linear"], "layer_type_quant_config.Linear")
        else:
            common = _read_scheme(config.get("global_quant_config"), "global_quant_config")
        return cls(
            common=common,
            layers={
                name: _read_scheme(value, f"layer_quant_config.{name}") for name, value in layers.items()
            },
            reorder=pack == "reorder",
            exclude=read_names(config, "exclude", regex="re:"),
            kv_cache=_kv_cache_tensors(export, layers, config.get("kv_cache_quant_config")),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        names = self.spellings(prefix)
        excluded = any(_names(pattern, name) for pattern in self.exclude for name in names)
        hits = (method for key, method in self.layers.items() if any(_names(key, name) for name in names))
        found = next(hits, self.common)
        excluded |= found is None
        if not self.covers(layer, prefix, "weight_scale", excluded=excluded):
            return None
        said = None if excluded else self._completed(found, prefix)
        others = (self._completed(method, prefix) for method in (self.common, *self.layers.values()))
        return self.as_stored(layer, prefix, said, others)

    def _completed(self, method: LinearMethodBase | None, prefix: str) -> LinearMethodBase | None:
        """Complete the method with what the config leaves open and the checkpoint's headers say."""
        scale = self.stored.get(f"{prefix}.weight_scale")
        if isinstance(method, MXFP8LinearMethod):
            return stored_mxfp8(self.stored, prefix, "Quark", method.activations)
        if isinstance(method, MXFP4LinearMethod):
            return stored_mxfp4(self.stored, prefix, "Quark", method.activations)
        if isinstance(method, QuarkIntLinearMethod):
            method = replace(method, reorder=self.reorder)
            if method.symmetric and self.stored:
                method = replace(method, stored_zeros=f"{prefix}.weight_zero_point" in self.stored)
            if method.activations == "static" and f"{prefix}.input_zero_point" in self.stored:
                method = replace(method, activations="static asym")
        elif isinstance(method, NamedFp8LinearMethod) and method.block == CHANNEL and scale is not None:
            method = replace(method, flat_scale=len(scale.shape) == 1)
        return method

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        if self.kv_cache is None:
            return None
        found = tuple(self.kv_cache.get(field) for field in ("dtype", "qscheme", "is_dynamic"))
        if found not in (("fp8_e4m3", "per_tensor", False), ("fp8_e4m3", "per_tensor", None)):
            raise unsupported_kv_cache(
                "layer_quant_config.output_tensors", self.kv_cache, "fp8_e4m3, per_tensor, static"
            )
        return QuantizedKVCacheMethod("fp8")


def _kv_cache_tensors(export: Any, layers: Mapping[str, Any], caches: Any) -> Mapping[str, Any] | None:
    """Find how keys and values are to be stored: `output_tensors` of the layers that make them.

    These are in kv_cache_quant_config (caches), or are those of layer_quant_config that export's kv_cache_group names.
    """
    group = read_names(export, "kv_cache_group") if isinstance(export, Mapping) else ()
    found = list(caches.values()) if isinstance(caches, Mapping) else []
    found += [layers.get(name) for name in group]
    tensors = (layer.get("output_tensors") for layer in found if isinstance(layer, Mapping))
    return next((settings for settings in tensors if isinstance(settings, Mapping)), None)


def _refuse_rotations(algorithms: Any) -> None:
    """Raise ConfigError for an algorithm that rotates activations as the model runs; others change weights alone."""
    entries = algorithms if isinstance(algorithms, list) else [algorithms]
    for entry in entries:
        online = [name for name in ONLINE if isinstance(entry, Mapping) and entry.get(name)]
        if online:
            supported = "null: without the rotation of activations every answer would be wrong"
            raise _unsupported(f"algo_config.{online[0]}", entry[online[0]], supported)


def _names(pattern: str, prefix: str) -> bool:
    """Tell whether a pattern names the layer: `re:` and a regular expression, or a name with shell wildcards."""
    if pattern.startswith("re:"):
        return compile_pattern(pattern[3:], "exclude").search(prefix) is not None
    return compile_wildcards(pattern, "layer_quant_config or exclude").fullmatch(prefix) is not None


def _read_scheme(scheme: Any, at: str) -> LinearMethodBase | None:
    """Read one layer's config: weight and input_tensors.  None: the layer is not quantised.  at: its path."""
    if not isinstance(scheme, Mapping):
        raise _unsupported(at, scheme, "an object with weight and input_tensors")
    within = f"quantization_config.{at}."
    weight, inputs = scheme.get("weight"), scheme.get("input_tensors")
    if weight is None:
        return None
    if scheme.get("output_tensors") is not None and "proj" not in at:
        raise _unsupported("output_tensors", scheme["output_tensors"], "null", within=within)
    dtype = weight.get("dtype") if isinstance(weight, Mapping) else weight
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _unsupported("dtype", dtype, " or ".join(DTYPES), within=within + "weight.")
    if weight.get("is_dynamic"):
        raise _unsupported("is_dynamic", True, "false", within=within + "weight.")
    read = {"fp4": _read_fp4, "fp8_e4m3": _read_fp8}.get(dtype, _read_int)
    return read(weight, inputs, within)


def _read_int(weight: Mapping[str, Any], inputs: Any, within: str) -> LinearMethodBase:
    bits, signed = INTEGERS[weight["dtype"]]
    per = SCHEMES.get(str(weight.get("qscheme")))
    if per is None:
        raise _unsupported("qscheme", weight.get("qscheme"), " or ".join(SCHEMES), within=within + "weight.")
    if weight.get("zero_point_type") not in ("int32", None):
        raise _unsupported("zero_point_type", weight["zero_point_type"], "int32", within=within + "weight.")
    _expect_axis(weight, per, within)
    return QuarkIntLinearMethod(
        bits,
        signed,
        per,
        _group_size(weight, within) if per == "group" else 0,
        symmetric=weight.get("symmetric") is not False,
        activations=_read_inputs(inputs, within, "int8"),
    )


def _read_fp4(weight: Mapping[str, Any], inputs: Any, within: str) -> LinearMethodBase:
    found = tuple(weight.get(field) for field in ("qscheme", "group_size", "scale_format"))
    if found != ("per_group", MX_GROUP, "e8m0"):
        expected = f"qscheme per_group, group_size {MX_GROUP}, scale_format e8m0"
        raise _unsupported("qscheme, group_size, scale_format", found, expected, within=within + "weight.")
    return MXFP4LinearMethod(activations=_read_inputs(inputs, within, "fp4"))


def _read_fp8(weight: Mapping[str, Any], inputs: Any, within: str) -> LinearMethodBase:
    scheme = weight.get("qscheme")
    block: Any = weight.get("block_size")
    activations = _read_inputs(inputs, within, "fp8_e4m3")
    if (
        scheme == "per_group"
        and weight.get("scale_format") == "e8m0"
        and weight.get("group_size") == MX_GROUP
    ):
        return MXFP8LinearMethod(activations="group mx" if activations == "group" else activations)
    if weight.get("scale_format") not in ("float32", None):
        raise _unsupported(
            "scale_format", weight["scale_format"], "float32 or null", within=within + "weight."
        )
    if scheme == "per_group":
        return NamedFp8LinearMethod((1, _group_size(weight, within)), activations, format="quark")
    if scheme == "per_block" and is_block(block):
        return NamedFp8LinearMethod((block[0], block[1]), activations, format="quark")
    if scheme not in ("per_tensor", "per_channel"):
        known = "per_tensor, per_channel, per_group, or per_block with block_size"
        raise _unsupported("qscheme", scheme, known, within=within + "weight.")
    return NamedFp8LinearMethod(TENSOR if scheme == "per_tensor" else CHANNEL, activations, format="quark")


def _read_inputs(inputs: Any, within: str, dtype: str) -> Activations:
    """Read how activations are rounded: to the weights' own type (`dtype`), or to fp8 beside fp4 and integers."""
    if inputs is None:
        return "float"
    within += "input_tensors."
    found = inputs.get("dtype") if isinstance(inputs, Mapping) else inputs
    if found not in (dtype, "fp8_e4m3"):
        raise _unsupported("dtype", found, " or ".join(dict.fromkeys((dtype, "fp8_e4m3"))), within=within)
    scheme, dynamic = inputs.get("qscheme"), bool(inputs.get("is_dynamic"))
    beside = found != dtype  # fp8 beside another type
    if scheme == "per_group" and dynamic and not beside and dtype != "int8":
        return "group"
    if dtype == "fp4" and not beside:
        raise _unsupported("qscheme", scheme, "per_group, dynamic", within=within)
    if dynamic:
        kind: Activations = "tensor" if scheme == "per_tensor" else "token"
        if beside and kind == "tensor":
            raise _unsupported("qscheme", scheme, "per_channel (a token) where it is dynamic", within=within)
        return "token fp8" if beside else kind
    if scheme not in ("per_tensor", None):
        raise _unsupported("qscheme", scheme, "per_tensor where it is not dynamic", within=within)
    return "static fp8" if beside else "static"


def _group_size(weight: Mapping[str, Any], within: str) -> int:
    size = weight.get("group_size")
    if type(size) is not int or size <= 0:
        raise _unsupported("group_size", size, "a positive integer", within=within + "weight.")
    return size


def _expect_axis(weight: Mapping[str, Any], per: str, within: str) -> None:
    """Raise ConfigError for scales that do not follow rows (channels), or the inputs of rows (groups)."""
    allowed = {"channel": (0, None), "group": (1, -1, None)}.get(per)
    if allowed is not None and weight.get("ch_axis") not in allowed:
        raise _unsupported("ch_axis", weight["ch_axis"], str(allowed[0]), within=within + "weight.")
