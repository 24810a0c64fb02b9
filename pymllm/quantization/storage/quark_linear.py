"""Quark's integer linear weights: int4, uint4, int8 and uint8.

                        per_group              per_channel           per_tensor
    weight, 4 bits      int32 [I, O/8]         int32 [O, I/8]        int32 [O, I/8]
    weight, 8 bits      8-bit [I, O]           8-bit [O, I]          8-bit [O, I]
    weight_scale        float [I/G, O]         float [O]             float []
    weight_zero_point   int32 [I/G, O/8]       int32 [O/8]           int32 []           4 bits
                        8-bit [I/G, O]         8-bit [O]             8-bit []           8 bits
    input_scale, input_zero_point  []                                                   static activations

A word holds eight 4-bit codes, lowest bits first: the columns 0 2 4 6 1 3 5 7 of its eight with pack_method "reorder",
0 to 7 with "order". Codes of int4 and int8 are two's complement. w = (code - zero point) * scale.
The page with the layouts: quantization/quark/README.md.
"""

# I in_features, O out_features, G group_size, P parts of a fused layer

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import Activations, CanonicalWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.groups import check_groups, rows_of_parts
from pymllm.quantization.storage.integer_linear import grouped_weight
from pymllm.quantization.storage.packing import unpack_fields
from pymllm.weights.spec import FLOATS, IN, OUT, PART, LinearShape, WeightSpec

PER_WORD = 8
# Where a word's eight columns lie in it, counted in nibbles from the low end, with pack_method "reorder".
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class QuarkIntLinearMethod(LinearMethodBase):
    """Integer weights.

    signed: int4 or int8, not uint4 or uint8.  per: what shares a scale.  group_size: of "group".
    symmetric: zero points are the middle code everywhere.  stored_zeros: they are stored all the same.
    reorder: how words are packed.  activations: "static asym" has an input_zero_point beside the input_scale.
    """

    bits: int
    signed: bool
    per: Literal["tensor", "channel", "group"]
    group_size: int = 0
    symmetric: bool = True
    stored_zeros: bool = True
    reorder: bool = True
    activations: Activations = "float"
    name: ClassVar[str] = "quark"

    @property
    def fuses(self) -> bool:
        return self.activations != "static asym"  # each part has a zero point of its own for its activations

    @property
    def element(self) -> torch.dtype:
        """The dtype of the stored codes."""
        return torch.int32 if self.bits == 4 else torch.int8 if self.signed else torch.uint8

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups, words = IN.every(self.group_size), self.bits == 4
        outputs = OUT.packed(PER_WORD) if words else OUT
        inputs = IN.packed(PER_WORD) if words else IN
        codes, scales, zeros = {
            "group": ((IN, outputs), (groups, OUT), (groups, outputs)),
            "channel": ((OUT, inputs), (OUT,), (outputs,)),
            "tensor": ((OUT, inputs), (PART,), (PART,)),
        }[self.per]
        specs = [
            WeightSpec("weight", self.element, codes),
            WeightSpec("weight_scale", torch.float32, scales, accepts=FLOATS, scale=True),
        ]
        if self.stored_zeros:
            refuse = self._refuse_zeros if self.symmetric else None
            specs.append(WeightSpec("weight_zero_point", self.element, zeros, refuse=refuse))
        if self.activations in ("static", "static asym", "static fp8"):
            specs.append(WeightSpec("input_scale", torch.float32, (PART,), accepts=FLOATS, scale=True))
        if self.activations == "static asym":
            specs.append(WeightSpec("input_zero_point", torch.int8, (PART,)))
        return tuple(specs)

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape)
        packed = [shape.in_features] if self.per != "group" else [span.total for span in shape.outputs]
        if self.bits == 4 and any(size % PER_WORD for size in packed):
            raise ConfigError(
                f"Quark packs {PER_WORD} codes of 4 bits a word, which does not divide {packed}",
                code="packing",
                tensor=shape.name,
                expected=f"a multiple of {PER_WORD} {'outputs' if self.per == 'group' else 'inputs'}",
                found=str(packed),
            )

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        codes, scales = self._codes(tensors["weight"]), tensors["weight_scale"]
        zeros = None if self.symmetric else tensors["weight_zero_point"]
        if self.per == "group":
            codes, scales = codes.t().contiguous(), scales.t().contiguous()
            zeros = None if zeros is None else self._codes(zeros).t().contiguous()
        elif self.per == "channel":
            scales = scales.unsqueeze(1)
            if zeros is not None:
                zeros = self._codes(zeros.unsqueeze(0)).t()[: scales.shape[0]].contiguous()
        else:
            scales = rows_of_parts(scales, shape).unsqueeze(1)
            if zeros is not None:  # not packed
                values = (zeros.to(torch.uint8) ^ (self._middle if self.signed else 0)) & (2**self.bits - 1)
                zeros = rows_of_parts(values, shape).unsqueeze(1)
        return grouped_weight(
            codes,
            scales,
            zeros,
            self.bits,
            self.group_size,
            shape,
            activations=self.activations,
            input_scales=tensors.get("input_scale"),
            input_zeros=tensors.get("input_zero_point"),
        )

    @property
    def _middle(self) -> int:
        return int(2 ** (self.bits - 1))

    def _codes(self, stored: Tensor) -> Tensor:
        """Unpack [N, K] stored codes, eight a word in 4 bits, to uint8 from 0 up."""
        if self.bits == 8:
            codes = stored.view(torch.uint8)
        else:
            codes = unpack_fields(stored, 4)
            if self.reorder:
                codes = codes.unflatten(1, (-1, PER_WORD))[:, :, list(NIBBLES)].flatten(1)
        return codes ^ self._middle if self.signed else codes  # two's complement, raised by the middle

    def _refuse_zeros(self, stored: Tensor, shape: LinearShape) -> str | None:
        """Refuse zero points that are not the middle code although the config says symmetric."""
        unsigned = (
            0
            if self.signed
            else 0x88888888 - 2**32
            if self.bits == 4 and self.per != "tensor"
            else self._middle
        )
        if bool((stored == unsigned).all()):
            return None
        return "zero points that are not the middle code, although the config says symmetric"

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.per == "group" else f"per {self.per}"
        zeros = "sym" if self.symmetric else "asym"
        return f"{self.name} int{self.bits} {groups} {zeros}, activations {self.activations}"
