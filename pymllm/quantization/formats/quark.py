"""Quark FP8 (`quant_method: quark`): e4m3 weights with a scale for the tensor or for each channel.

    weight        float8_e4m3fn [O, I]
    weight_scale  float [] (per_tensor) or [O] (per_channel)
    input_scale   float []                                      with static activations

w = weight * weight_scale. Quark's other dtypes (int4, int8, fp4) are refused. The page with the layouts:
quantization/quark/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    unsupported_kv_cache,
    unused_kv_tensor,
)
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fields import compile_pattern, read_names, unsupported
from pymllm.quantization.storage.fp8_linear import NamedFp8LinearMethod
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import CALIBRATION, PROCESS, REFUSED, STORED_DTYPE, WRITER

_unsupported = functools.partial(unsupported, "Quark")

BLOCKS = {"per_tensor": TENSOR, "per_channel": CHANNEL}


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
    kv_cache: how keys and values are to be stored, as the config has it, or None.
    """

    common: NamedFp8LinearMethod | None
    layers: Mapping[str, NamedFp8LinearMethod | None]
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
            exclude=read_names(config, "exclude", regex="re:"),
            kv_cache=_kv_cache_tensors(export, layers),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        excluded = any(_names(pattern, prefix) for pattern in self.exclude)
        if excluded or not self.covers(layer, prefix, "weight_scale"):
            return None
        scale = self.stored.get(f"{prefix}.weight_scale")
        found = next((method for name, method in self.layers.items() if _names(name, prefix)), self.common)
        if found is None or found.block == TENSOR or scale is None:
            return found
        return replace(found, flat_scale=len(scale.shape) == 1)

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        if self.kv_cache is None:
            return None
        found = tuple(self.kv_cache.get(field) for field in ("dtype", "qscheme", "is_dynamic"))
        if found not in (("fp8_e4m3", "per_tensor", False), ("fp8_e4m3", "per_tensor", None)):
            raise unsupported_kv_cache(
                "layer_quant_config.output_tensors", self.kv_cache, "fp8_e4m3, per_tensor, static"
            )
        return QuantizedKVCacheMethod("fp8")

    def skip_reason(self, tensor: str) -> str | None:
        return unused_kv_tensor(tensor)


def _kv_cache_tensors(export: Any, layers: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Find how keys and values are to be stored: `output_tensors` of the layers that export's kv_cache_group names."""
    group = export.get("kv_cache_group") if isinstance(export, Mapping) else None
    for name in group or ():
        tensors = layers.get(name, {}).get("output_tensors")
        if isinstance(tensors, Mapping):
            return tensors
    return None


def _names(pattern: str, prefix: str) -> bool:
    """Tell whether a pattern names the layer: `re:` and a regular expression, or a name with shell wildcards."""
    if pattern.startswith("re:"):
        return compile_pattern(pattern[3:], "exclude").search(prefix) is not None
    return fnmatch.fnmatchcase(prefix, pattern)


def _read_scheme(scheme: Any, at: str) -> NamedFp8LinearMethod | None:
    """Read one layer's config: weight and input_tensors.  None: the layer is not quantised.  at: its path."""
    if not isinstance(scheme, Mapping):
        raise _unsupported(at, scheme, "an object with weight and input_tensors")
    within = f"quantization_config.{at}."
    weight, inputs = scheme.get("weight"), scheme.get("input_tensors")
    if weight is None:
        return None
    if scheme.get("output_tensors") is not None and "proj" not in at:
        raise _unsupported("output_tensors", scheme["output_tensors"], "null", within=within)
    _check_fp8(weight, within + "weight.")
    block = BLOCKS.get(weight.get("qscheme"))
    if block is None:
        raise _unsupported("qscheme", weight.get("qscheme"), " or ".join(BLOCKS), within=within + "weight.")
    if weight.get("is_dynamic"):
        raise _unsupported("is_dynamic", True, "false", within=within + "weight.")
    activations: Activations = "float"
    if inputs is not None:
        _check_fp8(inputs, within + "input_tensors.")
        activations = "static" if not inputs.get("is_dynamic") else "token"
        if activations == "token" and inputs.get("qscheme") == "per_tensor":
            activations = "tensor"
    return NamedFp8LinearMethod(block, activations, format="quark")


def _check_fp8(settings: Any, within: str) -> None:
    found = settings.get("dtype") if isinstance(settings, Mapping) else settings
    if found != "fp8_e4m3":
        raise _unsupported("dtype", found, "fp8_e4m3", within=within)
