"""Plain integers of 2 to 8 bits as the targets of rules: any weights, rounded while they load.

    **.mlp.**=int4:group_size=64,scale=mse
    **.self_attn.**=int8

Options: group_size (how many inputs share a scale; -1: the whole row; by default 128, -1 for int8), symmetric
(true or false), scale (minmax, mse or hqq), activations (float; for int8 with symmetric whole rows also token or
static). What each does: quantization/integer.md. No checkpoint is stored like this, so it can only be a target.
"""

# O out_features, I in_features, G group_size

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import Activations, CanonicalWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import needs_calibration, one_of, parse_options, read_group_size
from pymllm.quantization.rounding.scales import refine_zeros, round_to_nearest, search_scales
from pymllm.quantization.storage.groups import check_groups, check_share, group_within
from pymllm.weights.spec import LinearShape, WeightSpec


@dataclass(frozen=True)
class IntegerLinearMethod(LinearMethodBase):
    """Integer weights that a rule makes.

    bits: 2 to 6, or 8.  group_size: how many inputs share a scale; -1: the whole row.  scale: how scales are chosen.
    activations: with compute=checkpoint, "token" rounds them to int8 with a scale for each token, "static" with scales
    that calibration finds.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale: str = "minmax"
    activations: Activations = "float"

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        raise _only_a_target(self.name)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        raise _only_a_target(self.name)

    def check(self, shape: LinearShape) -> None:
        fix = f"Give the rule another group_size, or -1 for whole rows: {self.name}:group_size=-1."
        check_groups(self.group_size, shape, fix=fix)
        check_share(self.group_size, shape)

    @property
    def quantizes_by_outputs(self) -> bool:
        return True

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        group_size = group_within(self.group_size, weight.shape[1])
        encode = {"minmax": round_to_nearest, "mse": search_scales, "hqq": refine_zeros}[self.scale]
        made = encode(weight.float(), self.bits, group_size, self.symmetric)
        if self.activations == "static":
            raise needs_calibration(self.describe(), shape)
        return replace(made, activations=self.activations)

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.group_size > 0 else "whole rows"
        activations = "" if self.activations == "float" else f", activations {self.activations}"
        return f"{self.name} {groups} {'sym' if self.symmetric else 'asym'} {self.scale}{activations}"


class IntegerConfig(QuantizationConfig):
    """The config of int2 to int8, which are targets of rules and never the format of a checkpoint."""

    bits: ClassVar[int]
    default_group_size: ClassVar[int] = 128

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IntegerConfig:
        raise _only_a_target(cls.get_name())

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        name = cls.get_name()
        values = parse_options(
            name,
            options,
            {
                "group_size": read_group_size,
                "symmetric": one_of("true", "false"),
                "scale": one_of("minmax", "mse", "hqq"),
                "activations": one_of("float", "token", "static"),
            },
        )
        scale = values.get("scale", "minmax")
        # Few codes are too few to leave half of them unused; int8 has enough, and kernels prefer it symmetric.
        default = "false" if scale == "hqq" or cls.bits < 8 else "true"
        symmetric = values.get("symmetric", default) == "true"
        if symmetric and scale == "hqq":
            raise ConfigError(
                f"{name}: scale=hqq refines zero points, and with symmetric=true there are none",
                code="bad-option",
                expected="symmetric=false, or scale=minmax or scale=mse",
                found="symmetric=true,scale=hqq",
            )
        group_size = values.get("group_size", cls.default_group_size)
        activations = values.get("activations", "float")
        if activations != "float" and not (cls.bits == 8 and group_size == -1 and symmetric):
            raise ConfigError(
                f"{name}: activations={activations} is only for symmetric int8 of whole rows",
                code="bad-option",
                expected="int8 with group_size=-1,symmetric=true, or activations=float",
                found=",".join(f"{key}={value}" for key, value in options.items()),
            )
        return IntegerLinearMethod(cls.bits, group_size, symmetric, scale, activations)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        raise _only_a_target(self.get_name())


@register_quantization("int2")
class Int2Config(IntegerConfig):
    """2 bits: groups of 128, with zero points."""

    bits = 2


@register_quantization("int3")
class Int3Config(IntegerConfig):
    """3 bits: groups of 128, with zero points."""

    bits = 3


@register_quantization("int4")
class Int4Config(IntegerConfig):
    """4 bits: groups of 128, with zero points."""

    bits = 4


@register_quantization("int5")
class Int5Config(IntegerConfig):
    """5 bits: groups of 128, with zero points."""

    bits = 5


@register_quantization("int6")
class Int6Config(IntegerConfig):
    """6 bits: groups of 128, with zero points."""

    bits = 6


@register_quantization("int8")
class Int8Config(IntegerConfig):
    """8 bits: a scale for each output, symmetric."""

    bits, default_group_size = 8, -1


def _only_a_target(name: str) -> ConfigError:
    return ConfigError(
        f"{name} is what a rule makes of a checkpoint's weights, not a format that checkpoints are stored in",
        code="not-a-format",
        expected="the quant_method of the tool that wrote the checkpoint",
        found=name,
        fix=f"To run a checkpoint in it: --quant '**={name}'.",
    )
