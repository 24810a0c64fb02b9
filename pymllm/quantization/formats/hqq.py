"""HQQ, as its `HQQLinear` and transformers store it: codes of 1 to 8 bits with float zero points.

    W_q    uint8 [n/G/c, G]   the weight laid flat in groups of G, c codes in a byte: byte r of a column holds the codes
                              of groups r, r + n/G/c, ..., the first in the high bits (3 bits: ten codes in an int32)
    scale  float [n/G, 1]
    zero   float [n/G, 1]     w = (code - zero) * scale

and every setting again as a tensor of its own (nbits, group_size, axis, shape, ...), which is skipped.
The page with the layout: quantization/hqq/README.md.
"""

# I in_features, O out_features, G group_size, n values

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, ShardingError, counted
from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fields import read_names, unsupported
from pymllm.quantization.storage.groups import check_groups
from pymllm.quantization.storage.settings import HarmlessSettings, below, harmless
from pymllm.quantization.storage.writer_settings import CALIBRATION, SWITCH
from pymllm.weights.report import Skip
from pymllm.weights.spec import FLOATS, OUT, LinearShape, WeightSpec, whole

_unsupported = functools.partial(unsupported, "HQQ")

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # bits -> codes in a stored element
SETTINGS = frozenset(
    {"nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"}
    | {"quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"}
    | {"channel_wise", "optimize", "round_zero"}
)


@dataclass(frozen=True)
class HQQLinearMethod(LinearMethodBase):
    """HQQ's weights.  group_size: how many inputs share a scale.  float_dtype: of scales and zero points."""

    bits: int
    group_size: int
    float_dtype: torch.dtype = torch.float16
    name: ClassVar[str] = "hqq"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        word = torch.int32 if self.bits == 3 else torch.uint8
        groups = (OUT.flattened(self.group_size), whole(1))
        # An element holds codes of rows from all over the weight: every rank reads all of them, and keeps its rows.
        packed = OUT.flattened(self.group_size * PER_WORD[self.bits]).undivided()
        return (
            WeightSpec("W_q", word, (packed, whole(self.group_size))),
            WeightSpec("scale", self.float_dtype, groups, accepts=FLOATS, scale=True),
            WeightSpec("zero", self.float_dtype, groups, accepts=FLOATS),
        )

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape, what="HQQ groups")
        per_word = PER_WORD[self.bits]
        for part, span in zip(shape.names, shape.outputs, strict=True):
            groups = span.total * shape.in_features // self.group_size
            if self.bits != 3 and groups % per_word:
                raise ConfigError(
                    f"HQQ packs {counted(per_word, 'group')} an element, which do not divide {groups}",
                    code="packing",
                    tensor=part,
                    expected=f"a multiple of {counted(per_word, 'group')}",
                    found=str(groups),
                )
        size, start, stop = self.group_size, shape.inputs.start, shape.inputs.stop
        if (start % size or stop % size) and start // size != (stop - 1) // size:
            raise ShardingError(
                f"{shape.name}: this rank would take inputs {start}:{stop}, which splits a group of {size}",
                code="tp-granule",
                expected=f"edges at multiples of {size}",
                found=f"{start}:{stop} of {shape.in_features}",
            )

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        size, row = self.group_size, shape.in_features // self.group_size
        start, stop = shape.inputs.start, shape.inputs.stop
        first, last = start // size, -(-stop // size)
        packed_sizes = [span.total * row for span in shape.outputs]
        words = tensors["W_q"].split([-(-groups // PER_WORD[self.bits]) for groups in packed_sizes])
        codes = []
        for word, span in zip(words, shape.outputs, strict=True):
            groups = unpack_groups(word, self.bits)[span.start * row : span.stop * row]
            codes.append(groups.view(span.size, shape.in_features)[:, start:stop])
        scales, zeros = (
            tensors[name].view(-1, row)[:, first:last].contiguous() for name in ("scale", "zero")
        )
        offsets = -zeros.float() * scales.float()
        group = (stop - start) // (last - first)
        return IntWeight(torch.cat(codes), scales, None, self.bits, group, offsets=offsets)

    def describe(self) -> str:
        return f"hqq int{self.bits} g{self.group_size}"


def unpack_groups(words: Tensor, bits: int) -> Tensor:
    """Unpack [N, G] words to [N * c, G] uint8 codes: those in the words' high bits first, in their low bits last."""
    count = PER_WORD[bits]
    mask = 2**bits - 1
    pieces = [((words >> (bits * (count - 1 - index))) & mask).to(torch.uint8) for index in range(count)]
    return torch.cat(pieces)


_PARAMS = {
    **harmless(CALIBRATION, "weight_quant_params.optimize weight_quant_params.round_zero"),
    **harmless("where the writer held scales", "offload_meta", only=SWITCH),
}
HARMLESS = below("quant_config quant_config.*", _PARAMS)


@register_quantization("hqq")
@dataclass(kw_only=True, eq=False)
class HQQConfig(QuantizationConfig):
    """`quantization_config` of HQQ: quant_config (weight_quant_params, or one for each layer's tag), skip_modules.

    common: (bits, group_size) of all layers, or None.  tagged: the same by tag, where there is no `common`.
    A group_size of None is the whole row.  used: what layers were read with, and their inputs where these are known.
    """

    common: tuple[int, int | None] | None
    tagged: Mapping[str, tuple[int, int | None]]
    skip_modules: tuple[str, ...] = ()
    used: dict[str, tuple[HQQLinearMethod, int | None]] = field(default_factory=dict)
    harmless: ClassVar[HarmlessSettings] = HARMLESS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> HQQConfig:
        settings = config.get("quant_config")
        if not isinstance(settings, Mapping) or not settings:
            raise _unsupported("quant_config", settings, "an object with weight_quant_params")
        common, tagged = None, {}
        if "weight_quant_params" in settings:
            common = _read_params(settings, "quant_config.")
        else:
            tagged = {tag: _read_params(value, f"quant_config.{tag}.") for tag, value in settings.items()}
        return cls(common=common, tagged=tagged, skip_modules=read_names(config, "skip_modules"))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        # A layer's tag is its name without "model", "layers" and numbers: self_attn.q_proj.
        tag = ".".join(
            part for part in prefix.split(".") if part not in ("model", "layers") and not part.isnumeric()
        )
        params = self.common if self.common is not None else self.tagged.get(tag)
        excluded = params is None or any(name in self.skip_modules for name in (tag, *self.spellings(prefix)))
        if not self.covers(layer, prefix, "W_q", excluded=excluded):
            return None
        found: LinearMethodBase | None = None
        if params is not None and not excluded:
            found = self._method(params, layer, prefix)
        if found is None or self.common is None:
            others = [self.common] if self.common is not None else list(self.tagged.values())
            found = self.as_stored(layer, prefix, found, (self._method(p, layer, prefix) for p in others))
        if isinstance(found, HQQLinearMethod):
            self.used[prefix] = found, getattr(getattr(layer, "shape", None), "in_features", None)
        return found

    def _method(self, params: tuple[int, int | None], layer: nn.Module, prefix: str) -> HQQLinearMethod:
        """Make the method of a layer with these bits and group size."""
        bits, size = params
        scale = self.stored.get(f"{prefix}.scale")
        if size is None:
            # One group a row, of a length that only the layer knows.
            size = int(getattr(layer, "in_features", 0)) or _row_of(self.stored.get(f"{prefix}.W_q"))
        dtype = torch.float16 if scale is None or scale.dtype not in FLOATS else scale.dtype
        return HQQLinearMethod(bits, size, dtype)

    def skip_reason(self, tensor: str) -> Skip | str | None:
        prefix, _, suffix = tensor.rpartition(".")
        if suffix in SETTINGS and f"{prefix}.W_q" in self.stored:
            refuse = functools.partial(self._refuse_setting, prefix, suffix)
            return Skip("a setting of HQQ, which quantization_config gives too", refuse)
        return None

    def _refuse_setting(self, prefix: str, name: str, stored: Tensor) -> str | None:
        """Return why a stored setting is not what the layer was read with, or None.  Texts are stored as bytes."""
        if prefix not in self.used:
            return "the layer was not read as HQQ"
        method, inputs = self.used[prefix]
        values = stored.flatten().tolist()
        if name == "packing":
            found, expected = bytes(values).decode("utf-8", "replace"), f"{method.bits}bit_"
            return (
                None if found.startswith(expected) else f"{found!r}, where the config has {method.bits} bits"
            )
        known: dict[str, list[Any]] = {
            "nbits": [method.bits],
            "group_size": [method.group_size],
            "axis": [1],
            "view_as_float": [0],
            "quant_scale": [0],
            "quant_zero": [0],
            "channel_wise": [1],
        }
        if name == "shape" and inputs is not None:
            known["shape"] = [*values[:1], inputs]
        expected_values = known.get(name, values)
        return (
            None
            if values == expected_values
            else f"{values}, where the layer was read with {expected_values}"
        )


def _row_of(words: Any) -> int:
    if words is None:
        raise _unsupported("group_size", None, "a number", within="quantization_config.quant_config.")
    return int(words.shape[-1])


def _read_params(settings: Any, at: str) -> tuple[int, int | None]:
    """Read (bits, group_size) of one quant_config; a group_size of None is the whole row.  at: its path, with a dot."""
    within = f"quantization_config.{at}"
    params = settings.get("weight_quant_params") if isinstance(settings, Mapping) else None
    if not isinstance(params, Mapping):
        raise _unsupported("weight_quant_params", params, "an object", within=within)
    within += "weight_quant_params."
    for name in ("scale_quant_params", "zero_quant_params"):
        if settings.get(name) is not None:
            raise _unsupported(
                name, settings[name], "null: float scales and zero points", within=f"quantization_config.{at}"
            )
    bits, size = params.get("nbits"), params.get("group_size", 64)
    if type(bits) is not int or bits not in PER_WORD:
        raise _unsupported("nbits", bits, " or ".join(map(str, PER_WORD)), within=within)
    if size is not None and (type(size) is not int or size <= 0):
        raise _unsupported("group_size", size, "a positive integer, or null for whole rows", within=within)
    # Groups along the other axis take in several outputs, and no kernel here has scales like that.
    for name, default, only in (
        ("axis", 0, 1),
        ("channel_wise", True, True),
        ("view_as_float", False, False),
    ):
        if params.get(name, default) != only:
            raise _unsupported(name, params.get(name, default), str(only), within=within)
    return bits, size
