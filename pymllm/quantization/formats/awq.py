"""AWQ int4, as AutoAWQ's GEMM layout stores it.

    qweight int32   [I, O/8]     eight 4-bit codes a word, in the order of NIBBLE_COLUMNS
    qzeros  int32   [I/G, O/8]   zero points, packed the same way
    scales  float16 [I/G, O]

w = (code - zero) * scale. The layout: quantization/awq/README.md.
"""

# I in_features, O out_features, G group_size

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.kernels.native.stored_codes import split_columns, splits_here
from pymllm.quantization.base import QuantizationConfig, register_quantization
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.options import one_of, parse_options, read_group_size
from pymllm.quantization.storage.fields import is_from_auto_round, is_group_size, read_names, unsupported
from pymllm.quantization.storage.groups import OTHER_SIZE, check_groups, group_within
from pymllm.quantization.storage.settings import below, harmless
from pymllm.quantization.storage.writer_settings import (
    AUTOROUND,
    GPTQMODEL,
    RUNNING,
    STORED_LAYER,
    SWITCH,
    TRANSFORMERS_GPTQ,
)
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, WeightSpec

_unsupported = functools.partial(unsupported, "AWQ")

# Nibble i of a word, from the low end, holds this column of its eight.
NIBBLE_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8


@dataclass(frozen=True)
class AWQLinearMethod(LinearMethodBase):
    """AWQ's weights.

    group_size: how many inputs share a scale; 0 or less: the whole row.
    zero_point: whether `quantize` chooses zero points; the middle code where not.
    signed: whether scales may be negative, as AutoRound chooses their sign.
    """

    group_size: int = 128
    zero_point: bool = True
    signed: bool = False
    name: ClassVar[str] = "awq"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups = IN.every(self.group_size)
        return (
            WeightSpec("qweight", torch.int32, (IN, OUT.packed(PER_WORD))),
            WeightSpec("qzeros", torch.int32, (groups, OUT.packed(PER_WORD))),
            WeightSpec(
                "scales",
                torch.float16,
                (groups, OUT),
                accepts=FLOATS,
                scale="signed" if self.signed else True,
            ),
        )

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape, fix=OTHER_SIZE)
        for part, span in zip(shape.names, shape.outputs, strict=True):
            if span.total % PER_WORD:
                raise ConfigError(
                    f"AWQ packs {PER_WORD} outputs a word, which does not divide {span.total}",
                    code="packing",
                    tensor=part,
                    expected=f"a multiple of {PER_WORD} outputs",
                    found=str(span.total),
                )

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        codes = unpack_columns(tensors["qweight"])
        scales = tensors["scales"].t().contiguous()
        # A rank that holds a part of one group has that group alone, of the size that it holds.
        return IntWeight(
            codes, scales, unpack_columns(tensors["qzeros"]), 4, codes.shape[1] // scales.shape[1]
        )

    @property
    def quantizes_by_outputs(self) -> bool:
        return True

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        group_size = group_within(self.group_size, weight.shape[1])
        return IntWeight.from_float(weight, bits=4, group_size=group_size, symmetric=not self.zero_point)

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, IntWeight)
        zeros = torch.full_like(weight.scales, 8, dtype=torch.uint8) if weight.zeros is None else weight.zeros
        return {
            "qweight": pack_columns(weight.codes),
            "qzeros": pack_columns(zeros),
            "scales": weight.scales.t().half().contiguous(),
        }

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.group_size > 0 else "whole rows"
        return f"awq int4 {groups}{'' if self.zero_point else ' sym'}"


def unpack_columns(words: Tensor) -> Tensor:
    """Unpack [N, O/8] int32 words to [O, N] uint8 codes 0..15 in column order.

    Words are transposed first, then taken apart byte by byte into whole rows: twice as fast as moving single codes.
    """
    if splits_here(words):
        return split_columns(words, NIBBLE_COLUMNS)
    octets = words.t().flatten().view(torch.uint8).view(words.shape[1], words.shape[0], 4)  # [O/8, N, 4]
    codes = torch.empty((words.shape[1], PER_WORD, words.shape[0]), dtype=torch.uint8, device=words.device)
    # A plan needs the shape alone, and torch's bit operations on meta tensors would load its compiler (0.7 s).
    for byte in range(0 if codes.is_meta else 4):
        codes[:, NIBBLE_COLUMNS[2 * byte]] = octets[:, :, byte] & 15
        codes[:, NIBBLE_COLUMNS[2 * byte + 1]] = octets[:, :, byte] >> 4
    return codes.view(-1, words.shape[0])


def pack_columns(codes: Tensor) -> Tensor:
    """Pack [O, N] uint8 codes into [N, O/8] int32 words, the inverse of `unpack_columns`."""
    columns = codes.t().reshape(codes.shape[1], -1, PER_WORD)[:, :, list(NIBBLE_COLUMNS)]
    octets = columns[:, :, 0::2] | (columns[:, :, 1::2] << 4)
    return octets.contiguous().view(torch.int32).squeeze(-1)


HARMLESS = {
    **AUTOROUND,
    **TRANSFORMERS_GPTQ,
    **GPTQMODEL,
    **harmless(STORED_LAYER, "modules_in_block_to_quantize ignore"),
    **harmless("zero_point says so, too", "sym", only=SWITCH),
    **harmless("AWQ has no order of its own", "desc_act", only=(False,)),
    **harmless("quant_method says so, too", "method", only=("awq",)),
    **harmless("words have 32 bits", "pack_dtype", only=("int32",)),
    **harmless("codes are integers", "data_type", only=("int",)),
    **harmless("activations stay floats", "act_bits", only=(16, 32)),
    **harmless(RUNNING, "do_fuse fuse_max_seq_len"),
    **below("modules_to_fuse", harmless(RUNNING, "attention layernorm mlp use_alibi hidden_size")),
    **below("modules_to_fuse", harmless(RUNNING, "num_attention_heads num_key_value_heads")),
}


@register_quantization("awq")
class AWQConfig(QuantizationConfig):
    """`quantization_config` of AutoAWQ: bits, group_size, zero_point, version, modules_to_not_convert."""

    harmless = HARMLESS

    def __init__(
        self,
        *,
        group_size: int,
        zero_point: bool = True,
        modules_to_not_convert: tuple[str, ...] = (),
        signed: bool = False,
    ) -> None:
        self.method = AWQLinearMethod(group_size, zero_point, signed)
        self.modules_to_not_convert = modules_to_not_convert

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return ["quant_config.json"]

    def settings_beside(self, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Rename the two settings that AutoAWQ's own file calls otherwise."""
        names = {"w_bit": "bits", "q_group_size": "group_size"}
        return super().settings_beside(name, {names.get(key, key): v for key, v in settings.items()})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AWQConfig:
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise _unsupported("bits", bits, "4")
        for field in ("version", "format", "checkpoint_format"):
            version = config.get(field, "gemm")
            if version is not None and str(version).lower() != "gemm":
                raise _unsupported(field, version, "gemm")
        group_size = config.get("group_size", config.get("q_group_size"))
        if not is_group_size(group_size):
            raise _unsupported("group_size", group_size, "-1 (whole rows) or a positive integer")
        return cls(
            group_size=group_size,
            zero_point=bool(config.get("zero_point", True)),
            modules_to_not_convert=read_names(config, "modules_to_not_convert"),
            signed=is_from_auto_round(config),
        )

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        values = parse_options(
            "awq", options, {"group_size": read_group_size, "zero_point": one_of("true", "false")}
        )
        return AWQLinearMethod(values.get("group_size", 128), values.get("zero_point") != "false")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        # Writers take modules_to_not_convert differently, so what the files hold decides. Where they hold nothing, as
        # AutoAWQ does it: it converts linear layers of decoder blocks whose name contains none of the strings.
        names = self.spellings(prefix)
        excluded = any(part in name for part in self.modules_to_not_convert for name in names)
        return self.method if self.covers(layer, prefix, "qweight", excluded=excluded) else None
