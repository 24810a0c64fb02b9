"""AutoRound's own spelling, `quant_method: auto-round`.  `packing_format` says whose tensors a checkpoint has:

    auto_round:auto_gptq             GPTQ, zero points minus one
    auto_round, auto_round:gptqmodel GPTQ, zero points as they are
    auto_round:auto_awq              AWQ (GEMM)
    auto_round:llm_compressor        compressed-tensors' NVFP4, MXFP4 and MXFP8 (data_type nv_fp, mx_fp)
    auto_round:fp8, fp8_static       float8 (data_type fp): `storage/auto_round_linear.py`

`extra_config` overrides settings of single layers, which may have another data_type than the others: `packing_format`
is then about layers of the others' alone. `block_name_to_quantize` names the blocks that are quantised.
A checkpoint that AutoRound exports as plain gptq or awq has that as its quant_method, and is read as such.
The page: quantization/gptq/README.md, "auto-round".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations
from pymllm.quantization.base import QuantizationConfig, get_quantization_config, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.auto_round_linear import AutoRoundFp8LinearMethod
from pymllm.quantization.storage.fields import (
    compile_pattern,
    is_block,
    is_regular_expression,
    read_choice,
    read_names,
    unsupported,
)
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import AUTOROUND, REFUSED, STORED_DTYPE, STORED_LAYER, SWITCH
from pymllm.weights.module_names import ModuleNames

_unsupported = functools.partial(unsupported, "AutoRound")

# packing_format -> the format of the tensors, and what the config for that format needs besides.
PACKINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "gptqmodel": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_awq": ("awq", {"version": "gemm"}),
    "awq": ("awq", {"version": "gemm"}),
    "llm_compressor": ("compressed-tensors", {}),
    "fp8_static": ("", {}),
    "fp8": ("", {}),
}
INTEGERS = ("gptq", "awq")
SETTINGS = (
    "bits",
    "group_size",
    "sym",
    "data_type",
    "act_bits",
    "act_data_type",
    "act_dynamic",
    "act_group_size",
)
# (data_type, bits) -> compressed-tensors' name, and the settings of its weights.
FLOAT_BLOCKS: dict[tuple[str, int], tuple[str, dict[str, Any]]] = {
    ("nv_fp", 4): ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}),
    ("mx_fp", 4): ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32}),
    ("mx_fp", 8): ("mxfp8-quantized", {"strategy": "group", "group_size": 32}),
}
CODES = (
    "qweight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
)  # of these a layer in floats has none
# A layer that is left at 16 bits of a model that was published in float8 stays as it was there.
SOURCE = AutoRoundFp8LinearMethod((128, 128), "float")
FLOAT_BITS = 16  # layers with as many bits or more are not quantised


_ACTIVATIONS = harmless(
    "of activations that stay floats, or are rounded as the weights", "act_sym act_group_size"
)
HARMLESS = {
    **AUTOROUND,
    **_ACTIVATIONS,
    **below(
        "extra_config.*",
        _ACTIVATIONS,
        harmless(STORED_DTYPE, "scale_dtype"),
        harmless("float8 is e4m3", "fmt", only=("e4m3",)),
        harmless("the format is that of all layers", "quant_method", only=("auto-round", "auto_round")),
    ),
    **harmless(STORED_LAYER, "lm_head quant_lm_head", only=SWITCH),
    **harmless("float8 is e4m3", "fmt", only=("e4m3",)),
    **harmless("group_size says so, too", "weight_block_size"),
    **harmless("act_dynamic says so, too", "activation_scheme", only=("dynamic", "static")),
    **harmless("inputs are in order", "desc_act", only=(False,)),
    **harmless(
        f"keys, values or queries are rounded, {REFUSED}", "static_kv_dtype static_attention_dtype", only=()
    ),
    **harmless(f"a rotation is undone while the model runs, {REFUSED}", "rotation_configs", only=()),
}


@register_quantization("auto-round")
@dataclass(kw_only=True, eq=False)
class AutoRoundConfig(QuantizationConfig):
    """`quantization_config` of AutoRound: bits, group_size, sym, data_type, packing_format, extra_config.

    packing: a key of PACKINGS.  settings: of all layers, those of SETTINGS that the config has.  layers: extra_config.
    blocks: names of the blocks that are quantised; none: all.  ignored: layers that are not.
    formats: the configs made so far, by their settings.
    """

    packing: str
    settings: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    blocks: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    formats: dict[tuple[Any, ...], QuantizationConfig] = field(default_factory=dict)
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoRoundConfig:
        packing = config.get("packing_format") or "auto_round:auto_gptq"
        short = str(packing).removeprefix("auto_round:")
        if short not in PACKINGS:
            raise _unsupported(
                "packing_format", packing, ", ".join(f"auto_round:{name}" for name in PACKINGS)
            )
        layers = config.get("extra_config") or {}
        if not isinstance(layers, Mapping) or not all(isinstance(v, Mapping) for v in layers.values()):
            raise _unsupported("extra_config", layers, "an object of settings by layer, or null")
        settings = {"sym": True, **_given(config)}
        for rotation in ("rotation_config", "spinquant_config"):
            if config.get(rotation):
                raise _unsupported(rotation, config.get(rotation), "null")
        read_choice("AutoRound", config, "fmt", "e4m3", ["e4m3", None])
        if config.get("weight_block_size") not in (None, config.get("group_size")):
            raise _unsupported("weight_block_size", config["weight_block_size"], "group_size again, or null")
        read = cls(
            packing=short,
            settings=settings,
            layers=layers,
            blocks=_read_blocks(config),
            ignored=read_names(config, "ignored_layers"),
        )
        for name in ("", *layers):
            read._format(name)
        return read

    def see_checkpoint(self, tensors: Any) -> None:
        super().see_checkpoint(tensors)
        for config in self.formats.values():
            config.see_checkpoint(tensors)

    def see_names(self, names: ModuleNames) -> None:
        super().see_names(names)
        for config in self.formats.values():
            config.see_names(names)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        named, names = self._key(prefix), self.spellings(prefix)
        blocks = tuple(f"{block}." for block in self.blocks)
        outside = named is None and bool(blocks) and not any(name.startswith(blocks) for name in names)
        outside |= named is None and any(name in self.ignored for name in names)
        found = None if outside else self._format(named or "", prefix)
        if not self.covers(layer, prefix, *CODES, excluded=found is None):
            return None
        said = self._method(found, layer, prefix)
        others = (self._method(self._format(key, prefix), layer, prefix) for key in ("", *self.layers))
        return self.as_stored(layer, prefix, said, (*others, SOURCE))

    def settings_beside(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take the file of GPTQ's or AWQ's readers for what it says of the integers."""
        return settings if name in (self.get_name(), *INTEGERS) else None

    def _method(
        self, found: QuantizationConfig | LinearMethodBase | None, layer: nn.Module, prefix: str
    ) -> LinearMethodBase | None:
        return found.get_quant_method(layer, prefix) if isinstance(found, QuantizationConfig) else found

    def _key(self, prefix: str) -> str | None:
        """Find the entry of extra_config for this layer: its name, or a regular expression found in its name."""
        names = self.spellings(prefix)
        exact = next((name for name in names if name in self.layers), None)
        if exact is not None:
            return exact
        patterns = (key for key in self.layers if _is_pattern(key))
        return next(
            (key for key in patterns if any(compile_pattern(key, "extra_config").search(n) for n in names)),
            None,
        )

    def _format(self, key: str, prefix: str = "") -> QuantizationConfig | LinearMethodBase | None:
        """Return the format of layers under this entry of extra_config ("": all others), or None for plain floats.

        prefix: a layer of these, whose stored tensors tell how integers are packed where packing_format does not.
        """
        settings = {**self.settings, **_given(self.layers.get(key, {}))}
        at = f"extra_config.{key}." if key else ""
        if isinstance(settings.get("bits"), int) and settings["bits"] >= FLOAT_BITS:
            return None
        element = settings.get("data_type", "int")
        if element == "fp":
            return _float8_method(settings, at)
        packing = self.packing
        if element != "int":
            config = _float_blocks(settings, at)
            if packing != "llm_compressor" and not key:
                raise _unsupported("packing_format", packing, f"auto_round:llm_compressor with {element}")
            packing = "llm_compressor"
        else:
            act_bits = settings.get("act_bits", FLOAT_BITS)
            if act_bits not in (FLOAT_BITS, 32):
                raise _unsupported(f"{at}act_bits", act_bits, f"{FLOAT_BITS} or 32 with integer weights")
            config = {k: settings.get(k) for k in ("bits", "group_size", "sym")}
            config |= {"zero_point": not config["sym"], "provider": "auto-round"}
            if PACKINGS[packing][0] not in INTEGERS and key:
                packing = "auto_awq" if self._packs_outputs(prefix) else "auto_gptq"
        name, more = PACKINGS[packing]
        if name not in (("compressed-tensors",) if element != "int" else INTEGERS):
            raise _unsupported(f"{at}data_type", element, f"one that {packing!r} packs")
        identity = (packing, *map(repr, config.values()))
        if identity not in self.formats:
            config = {k: v for k, v in config.items() if k != "zero_point" or name == "awq"}
            read = get_quantization_config(name).from_config({**config, **more, "quant_method": name})
            read.see_names(self.names)
            read.see_checkpoint(self.stored)
            self.formats[identity] = read
        return self.formats[identity]

    def _packs_outputs(self, prefix: str) -> bool:
        """Tell whether the layer's codes are packed along its outputs, as AWQ does it; GPTQ packs along the inputs."""
        words, scales = (self.stored.get(f"{prefix}.{name}") for name in ("qweight", "scales"))
        return words is not None and scales is not None and words.shape[-1] < scales.shape[-1]


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what the settings of all layers, or of one, say: those of SETTINGS that are not null."""
    return {name: value for name in SETTINGS if (value := settings.get(name)) is not None}


def _float_blocks(settings: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Make the compressed-tensors config of NVFP4, MXFP4 or MXFP8.  at: the path of these settings, for messages."""
    element: Any = settings["data_type"]
    bits: Any = settings.get("bits")
    family = next((name for name in ("nv_fp", "mx_fp") if str(element).startswith(name)), element)
    if not isinstance(family, str) or (family, bits) not in FLOAT_BLOCKS:
        known = ", ".join(f"{bits} bits of {name}" for name, bits in FLOAT_BLOCKS)
        raise _unsupported(f"{at}data_type", f"{bits} bits of {element}", f"int, fp, {known}")
    stored_as, layout = FLOAT_BLOCKS[family, bits]
    kind = {"type": "float", "num_bits": bits, "symmetric": True, **layout}
    act_bits = settings.get("act_bits", FLOAT_BITS)
    if act_bits not in (bits, FLOAT_BITS, 32) or (
        act_bits == bits and family not in str(settings.get("act_data_type"))
    ):
        raise _unsupported(f"{at}act_bits", act_bits, f"{bits} of {element}, or {FLOAT_BITS}")
    group = {
        "targets": ["Linear"],
        "weights": {**kind, "dynamic": False},
        "input_activations": {**kind, "dynamic": True} if act_bits == bits else None,
    }
    return {"format": stored_as, "config_groups": {"group_0": group}}


def _float8_method(settings: Mapping[str, Any], at: str) -> LinearMethodBase:
    """Make the method of e4m3 weights with a scale for the tensor, each row, or each group or block.

    group_size is 0, -1, a number of inputs, or [outputs, inputs].
    """
    if settings.get("bits") != 8:
        raise _unsupported(f"{at}bits", settings.get("bits"), "8 with data_type fp")
    size: Any = settings.get("group_size")
    if is_block(size):
        block = (size[0], size[1])
    elif type(size) is int and size >= -1:
        block = {0: TENSOR, -1: CHANNEL}.get(size, (1, size))
    else:
        expected = "0 (the tensor), -1 (a row), a number of inputs, or [outputs, inputs] with data_type fp"
        raise _unsupported(f"{at}group_size", size, expected)
    activations: Activations = "float"
    if settings.get("act_bits", FLOAT_BITS) == 8:
        grouped = block[1] > 0 and settings.get("act_group_size") == block[1]
        dynamic: Activations = "group" if grouped else "token"
        activations = dynamic if settings.get("act_dynamic", True) else "static"
    return AutoRoundFp8LinearMethod(block, activations)


def _is_pattern(key: str) -> bool:
    """Tell whether AutoRound takes a key of extra_config, which is no layer's name, for a regular expression."""
    return is_regular_expression(key) and any(sign in key for sign in "*+?[](){}|^$\\")


def _read_blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = [config.get(name) for name in ("block_name_to_quantize", "to_quant_block_names")]
    blocks = names[0] or names[1] or ()
    flat = blocks.split(",") if isinstance(blocks, str) else blocks
    if not isinstance(flat, (list, tuple)) or not all(isinstance(name, str) for name in flat):
        raise _unsupported("block_name_to_quantize", blocks, "a name, or a list of names")
    return tuple(name.strip() for name in flat)
