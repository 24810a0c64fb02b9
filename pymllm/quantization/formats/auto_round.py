"""AutoRound's own spelling, `quant_method: auto-round`: the tensors are GPTQ's or AWQ's, as `packing_format` says.

    auto_round:auto_gptq             GPTQ, zero points minus one
    auto_round, auto_round:gptqmodel GPTQ, zero points as they are
    auto_round:auto_awq              AWQ (GEMM)

`extra_config` overrides settings for single layers; `block_name_to_quantize` names the blocks that are quantised.
Checkpoints that AutoRound exports as plain gptq or awq name that as their quant_method.
The page: quantization/gptq/README.md, "auto-round".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from pymllm.errors import ConfigError
from pymllm.quantization.base import (
    LinearMethodBase,
    QuantizationConfig,
    get_quantization_config,
    register_quantization,
)

# packing_format: the format of the tensors, and what its own config must say besides
PACKINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "gptq": ("gptq", {"checkpoint_format": "gptq"}),
    "gptqmodel": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_round": ("gptq", {"checkpoint_format": "gptq_v2"}),
    "auto_awq": ("awq", {"version": "gemm"}),
    "awq": ("awq", {"version": "gemm"}),
}
SETTINGS = ("bits", "group_size", "sym", "data_type", "act_bits")
FLOAT_BITS = 16  # layers with as many bits or more are not quantised


@register_quantization("auto-round")
class AutoRoundConfig(QuantizationConfig):
    """`quantization_config` of AutoRound: bits, group_size, sym, data_type, packing_format, extra_config."""

    def __init__(
        self,
        *,
        packing: str,
        settings: Mapping[str, Any],
        layers: Mapping[str, Mapping[str, Any]],
        blocks: tuple[str, ...] = (),
    ) -> None:
        self.packing, self.settings, self.layers, self.blocks = packing, settings, layers, blocks
        self.formats: dict[tuple[Any, ...], QuantizationConfig | None] = {}

    @classmethod
    def get_name(cls) -> str:
        return "auto-round"

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
        settings = {"sym": True, **{name: config[name] for name in SETTINGS if config.get(name) is not None}}
        if config.get("rotation_config") or config.get("spinquant_config"):
            raise _unsupported("rotation_config", config.get("rotation_config"), "null")
        read = cls(packing=short, settings=settings, layers=layers, blocks=_read_blocks(config))
        for name in ("", *layers):
            read._format(name)
        return read

    def see_checkpoint(self, tensors: Any) -> None:
        super().see_checkpoint(tensors)
        for config in filter(None, self.formats.values()):
            config.see_checkpoint(tensors)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        named = self._key(prefix)
        if named is None and self.blocks and not any(prefix.startswith(f"{block}.") for block in self.blocks):
            return None
        config = self._format(named or "")
        return None if config is None else config.get_quant_method(layer, prefix)

    def _key(self, prefix: str) -> str | None:
        """The entry of extra_config for this layer: its name, or a regular expression found in it."""
        if prefix in self.layers:
            return prefix
        return next((key for key in self.layers if _is_pattern(key) and re.search(key, prefix)), None)

    def _format(self, key: str) -> QuantizationConfig | None:
        """The format of layers under this entry of extra_config ("": all others); None: plain floats."""
        settings = {**self.settings, **{k: v for k, v in self.layers.get(key, {}).items() if v is not None}}
        at = f"extra_config.{key}." if key else ""
        if isinstance(settings.get("bits"), int) and settings["bits"] >= FLOAT_BITS:
            return None
        for field, supported in (("data_type", ("int",)), ("act_bits", (FLOAT_BITS, 32))):
            if settings.get(field, supported[0]) not in supported:
                raise _unsupported(f"{at}{field}", settings[field], " or ".join(map(str, supported)))
        name, more = PACKINGS[self.packing]
        chosen = {k: settings.get(k) for k in ("bits", "group_size", "sym")}
        identity = tuple(chosen.values())
        if identity not in self.formats:
            config = get_quantization_config(name).from_config(
                {**chosen, "zero_point": not chosen["sym"], **more, "quant_method": name}
            )
            config.see_checkpoint(self.stored)
            self.formats[identity] = config
        return self.formats[identity]


def _is_pattern(key: str) -> bool:
    """As AutoRound takes them: what is no layer's name is a regular expression, if it can be one."""
    try:
        re.compile(key)
    except re.error:
        return False
    return any(sign in key for sign in "*+?[](){}|^$\\")


def _read_blocks(config: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = config.get("block_name_to_quantize") or config.get("to_quant_block_names") or ()
    flat = blocks.split(",") if isinstance(blocks, str) else blocks
    if not isinstance(flat, (list, tuple)) or not all(isinstance(name, str) for name in flat):
        raise _unsupported("block_name_to_quantize", blocks, "a name, or a list of names")
    return tuple(name.strip() for name in flat)


def _unsupported(field: str, value: Any, supported: str) -> ConfigError:
    return ConfigError(
        f"AutoRound with {field} {value!r} cannot be read",
        code="quantization-config",
        file="config.json",
        tensor=f"quantization_config.{field}",
        expected=supported,
        found=repr(value),
    )
