"""GPTQ, as AutoGPTQ and GPTQModel store it: 2, 3, 4 or 8 bits in groups of inputs.

    qweight int32   [I·bits/32, O]     codes, packed along the inputs
    qzeros  int32   [I/G, O·bits/32]   zero points, packed along the outputs; less one in checkpoint_format gptq
    scales  float16 [I/G, O]
    g_idx   int32   [I]                the group of each input; without desc_act in order, or absent

Fields lie in words lowest bits first; 32 fields of 3 bits fill three words.
w = (code - zero) * scale of the input's group. The page with the layout: quantization/gptq/README.md.
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import parse_options
from pymllm.quantization.storage.fields import (
    compile_pattern,
    is_from_auto_round,
    is_group_size,
    unsupported,
)
from pymllm.quantization.storage.groups import group_within
from pymllm.quantization.storage.integer_linear import group_dim, grouped_weight, index_spec, unpack_outputs
from pymllm.quantization.storage.packing import pack_words, unpack_words
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import (
    AUTOROUND,
    GPTQ_CALIBRATION,
    GPTQMODEL,
    TRANSFORMERS_GPTQ,
)
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, WeightSpec

_unsupported = functools.partial(unsupported, "GPTQ")

BITS = (2, 3, 4, 8)
# A one in every field of a word, which `checkpoint_format: gptq` subtracts from zero points. Writers subtract words, so
# that a zero point of 0 borrows from its neighbour, and adding words undoes it. Only 3 bits go field by field.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class GPTQLinearMethod(LinearMethodBase):
    """GPTQ's weights.

    group_size: how many inputs share a scale; 0 or less: the whole row.
    zeros_minus_one: whether zero points are stored less one.
    index: whether there is a g_idx, and whether its groups are in order.
    signed: whether scales may be negative, as AutoRound chooses their sign.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    zeros_minus_one: bool = True
    index: Literal["absent", "in order", "act order"] = "absent"
    signed: bool = False
    name: ClassVar[str] = "gptq"

    @property
    def fuses(self) -> bool:
        return self.index != "act order"  # in act order each part has an order of its own

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups = group_dim(self.group_size, shape, indexed=self.index == "act order")
        scale: Any = "signed" if self.signed and self.symmetric else True
        specs = (
            WeightSpec("qweight", torch.int32, (IN.in_words(self.bits), OUT)),
            WeightSpec("qzeros", torch.int32, (groups, OUT.in_words(self.bits)), refuse=self._refuse_zeros),
            WeightSpec("scales", torch.float16, (groups, OUT), accepts=FLOATS, scale=scale),
        )
        if self.index == "absent":
            return specs
        in_order = self.index == "in order"
        return *specs, index_spec("g_idx", self.group_size, in_order=in_order, accepts=(torch.int64,))

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        codes = unpack_words(tensors["qweight"].t(), self.bits)[:, : shape.in_features_local].contiguous()
        zeros = None if self.symmetric else self._zeros(tensors["qzeros"], shape)
        index = tensors["g_idx"].reshape(len(shape.outputs), -1) if self.index == "act order" else None
        scales = tensors["scales"].t().contiguous()
        return grouped_weight(codes, scales, zeros, self.bits, self.group_size, shape, index=index)

    def _zeros(self, words: Tensor, shape: LinearShape) -> Tensor:
        """Unpack zero points: [I/G, O·bits/32] words -> [O, I/G]."""
        if not self.zeros_minus_one:
            return unpack_outputs(words, self.bits, shape)
        if self.bits in ONES:
            return unpack_outputs(words + ONES[self.bits], self.bits, shape)
        return (unpack_outputs(words, self.bits, shape) + 1) & (2**self.bits - 1)

    def _refuse_zeros(self, words: Tensor, shape: LinearShape) -> str | None:
        """Refuse zero points that are not the middle code although the config says sym: they would not be read."""
        if not self.symmetric:
            return None
        whole_words = words.shape[1]
        if not shape.together:
            whole_words = (shape.outputs[0].stop - shape.outputs[0].start) * self.bits // 32
        elif shape.out_features * self.bits % 32:  # the last word of all may be filled in part
            whole_words -= 1
        stored = 2 ** (self.bits - 1) - self.zeros_minus_one
        fields = torch.full((1, whole_words * 32 // self.bits + 32), stored, device=words.device)
        if bool((words[:, :whole_words] == pack_words(fields, self.bits)[:, :whole_words]).all()):
            return None
        return f"zero points other than {2 ** (self.bits - 1)}, although the config says sym: true"

    @property
    def quantizes_by_outputs(self) -> bool:
        return True

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        group_size = group_within(self.group_size, weight.shape[1])
        if weight.shape[1] % group_size:
            raise ConfigError(
                f"groups of {group_size} do not divide the {weight.shape[1]} inputs",
                code="group-size",
                tensor=shape.name,
                expected=f"a multiple of {group_size}",
                fix="Use a group size that divides every layer's inputs, or -1 for whole rows.",
            )
        return IntWeight.from_float(weight, bits=self.bits, group_size=group_size, symmetric=self.symmetric)

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, IntWeight)
        codes, index = weight.codes, weight.group_index
        if index is None:
            index = torch.arange(codes.shape[1], dtype=torch.int32) // weight.group_size
        if weight.input_order is not None:  # columns lie by group: put both back in the order of inputs
            codes = torch.empty_like(codes).index_copy_(1, weight.input_order, codes)
            index = torch.empty_like(index).index_copy_(0, weight.input_order, index)
        middle = 2 ** (self.bits - 1)
        zeros = torch.full_like(weight.scales, middle) if weight.zeros is None else weight.zeros
        tensors = {
            "qweight": pack_words(codes, self.bits).t().contiguous(),
            "qzeros": self._pack_zeros(zeros.to(torch.uint8)),
            "scales": weight.scales.t().half().contiguous(),
        }
        return tensors if self.index == "absent" else {**tensors, "g_idx": index.to(torch.int32)}

    def _pack_zeros(self, zeros: Tensor) -> Tensor:
        """Pack zero points: [O, I/G] -> [I/G, O·bits/32] words.  It undoes `_zeros`."""
        if self.zeros_minus_one and self.bits not in ONES:
            return pack_words((zeros.t() - 1) & (2**self.bits - 1), self.bits)
        words = pack_words(zeros.t(), self.bits)
        return words - ONES[self.bits] if self.zeros_minus_one else words

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.group_size > 0 else "whole rows"
        order = " in act order" if self.index == "act order" else ""
        return f"gptq int{self.bits} {groups} {'sym' if self.symmetric else 'asym'}{order}"


@dataclass(frozen=True)
class DynamicRule:
    """One of the config's `dynamic` rules.

    pattern: what matches the start of a module's name.  overrides: settings; None: the modules stay in floats.
    """

    pattern: str
    overrides: Mapping[str, Any] | None

    def matches(self, name: str) -> bool:
        return compile_pattern(self.pattern, "dynamic").match(name) is not None


HARMLESS = {
    **AUTOROUND,
    **TRANSFORMERS_GPTQ,
    **GPTQMODEL,
    **below("dynamic.*", GPTQ_CALIBRATION),
    **harmless("quant_method says so, too", "method", only=("gptq",)),
    **harmless("codes are integers", "data_type", only=("int",)),
    **harmless("activations stay floats", "act_bits", only=(16, 32)),
}


@register_quantization("gptq")
@dataclass(kw_only=True, eq=False)
class GPTQConfig(QuantizationConfig):
    """`quantization_config` of GPTQ: bits, group_size, sym, desc_act, checkpoint_format, dynamic, lm_head.

    modules: names within a decoder block that are quantised; empty: all linear layers.
    """

    method: GPTQLinearMethod
    desc_act: bool = False
    dynamic: tuple[DynamicRule, ...] = ()
    modules: tuple[str, ...] = ()
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPTQConfig:
        named = {name: config.get(name) for name in ("checkpoint_format", "format")}
        stored_as = named["checkpoint_format"] or named["format"] or "gptq"
        for name, value in named.items():
            if value and value not in ("gptq", "gptq_v2"):
                raise _unsupported(name, value, "gptq or gptq_v2")
            if value and value != stored_as:
                raise _unsupported(name, value, f"{stored_as}, which checkpoint_format says")
        if config.get("is_marlin_format"):
            raise _unsupported("is_marlin_format", True, "false")
        method = GPTQLinearMethod(zeros_minus_one=stored_as == "gptq", signed=is_from_auto_round(config))
        method, desc_act = _read_settings(config, "", method)
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise _unsupported("dynamic", dynamic, "an object of rules, or null")
        return cls(
            method=method,
            desc_act=desc_act,
            dynamic=tuple(_read_rule(key, overrides, method) for key, overrides in dynamic.items()),
            modules=_read_modules(config.get("modules_in_block_to_quantize")),
        )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        values = parse_options(
            "gptq",
            options,
            {"bits": _option_bits, "group_size": int, "sym": lambda text: text.lower() == "true"},
        )
        if "sym" in values:
            values["symmetric"] = values.pop("sym")
        return GPTQLinearMethod(**values)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        names = self.spellings(prefix)
        rule = next((r for r in self.dynamic if any(r.matches(name) for name in names)), None)
        if rule is not None:
            excluded = rule.overrides is None
        else:
            excluded = bool(self.modules) and not prefix.endswith(tuple(f".{name}" for name in self.modules))
        if not self.covers(layer, prefix, "qweight", excluded=excluded):
            return None
        said = None if excluded else self._method(rule, prefix)
        if said is not None and not self.dynamic:
            return said
        rules = (None, *(rule for rule in self.dynamic if rule.overrides is not None))
        return self.as_stored(layer, prefix, said, (self._method(rule, prefix) for rule in rules))

    def _method(self, rule: DynamicRule | None, prefix: str) -> GPTQLinearMethod:
        """Make the method of layers under this rule; None: of those under none."""
        method, desc_act = self.method, self.desc_act
        if rule is not None:
            method, desc_act = _read_settings(
                rule.overrides or {}, f"dynamic.{rule.pattern}", method, desc_act
            )
        if desc_act and method.group_size > 0:  # one group has no order
            return replace(method, index="act order")
        return replace(method, index="in order" if f"{prefix}.g_idx" in self.stored else "absent")


def _read_settings(
    config: Mapping[str, Any], at: str, method: GPTQLinearMethod, desc_act: bool = False
) -> tuple[GPTQLinearMethod, bool]:
    """Read the settings of the config, or of a dynamic rule, which has those of `method` where it says nothing.

    at: the rule's path in the config; "": the config itself.  Returns the method, and whether it is in act order.
    """
    where = f"{at}." if at else ""
    bits = config.get("bits", method.bits if at else None)
    if bits not in BITS or isinstance(bits, bool):
        raise _unsupported(f"{where}bits", bits, "2, 3, 4 or 8")
    group_size = config.get("group_size", method.group_size if at else None)
    if not is_group_size(group_size):
        raise _unsupported(f"{where}group_size", group_size, "-1 (whole rows) or a positive integer")
    symmetric = config.get("sym", method.symmetric)
    act_order = config.get("desc_act", desc_act)
    for field, value in (("sym", symmetric), ("desc_act", act_order)):
        if type(value) is not bool:
            raise _unsupported(f"{where}{field}", value, "true or false")
    if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise _unsupported(f"{where}pack_dtype", config["pack_dtype"], "int32")
    if config.get("adapter"):
        raise _unsupported(f"{where}adapter", config["adapter"], "null")
    return replace(method, bits=bits, group_size=group_size, symmetric=symmetric), act_order


def _read_rule(key: str, overrides: Any, method: GPTQLinearMethod) -> DynamicRule:
    """Read one of GPTQModel's rules: "-:regex" leaves modules out, "+:regex" or "regex" overrides their settings."""
    pattern = key.removeprefix("-:") if key.startswith("-:") else key.removeprefix("+:")
    compile_pattern(pattern, f"dynamic.{key}", key.removesuffix(pattern))
    if key.startswith("-:"):
        return DynamicRule(pattern, None)
    if not isinstance(overrides, Mapping):
        raise _unsupported(f"dynamic.{key}", overrides, "an object of settings")
    _read_settings(overrides, f"dynamic.{key}", method)
    return DynamicRule(pattern, overrides)


def _read_modules(names: Any) -> tuple[str, ...]:
    """Read `modules_in_block_to_quantize`: a list of names, or of lists of names."""
    listed = names if isinstance(names, list) else []
    flat = [name for entry in listed for name in (entry if isinstance(entry, list) else [entry])]
    if (names and not isinstance(names, list)) or not all(isinstance(name, str) for name in flat):
        raise _unsupported("modules_in_block_to_quantize", names, "a list of names, or of lists of names")
    return tuple(flat)


def _option_bits(text: str) -> int:
    if text not in map(str, BITS):
        raise ValueError("Choose one of 2, 3, 4, 8.")
    return int(text)
