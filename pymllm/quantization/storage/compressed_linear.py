"""The linear methods of compressed-tensors, one for each family. `formats/compressed_tensors.py` chooses among them.

float8        weight e4m3 [O, I], weight_scale [1], [O, 1], [O, I/G] or [⌈O/b0⌉, ⌈I/b1⌉], input_scale [1] if static
mxfp8         weight e4m3 [O, I], weight_scale uint8 exponents [O, I/32]
int packed    weight_packed int32 [O, ceil(I·bits/32)], weight_scale [O, I/G], weight_shape int64 [2],
              weight_zero_point int32 [ceil(O·bits/32), I/G] if asymmetric, weight_g_idx int32 [I] if in act order
int unpacked  weight int8 [O, I], weight_scale [1], [O, 1] or [O, I/G], weight_zero_point int8 of the same shape;
              for activations input_scale [1] if static, and input_zero_point [1] if they have zero points
fp4           weight_packed uint8 [O, I/2], weight_scale e4m3 [O, I/16] and weight_global_scale f32 [1] (nvfp4),
              or uint8 exponents [O, I/32] (mxfp4); input_global_scale f32 [1]

The page with the layouts: quantization/compressed_tensors/README.md.
"""

# I in_features, O out_features, G group_size, P parts of a fused layer

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pymllm.kernels.canonical import Activations, CanonicalWeight, CodebookWeight, IntWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.fp4_linear import e2m1_weight, exact_reciprocal
from pymllm.quantization.storage.fp8_linear import E4M3LinearMethod
from pymllm.quantization.storage.groups import check_groups, rows_of_parts
from pymllm.quantization.storage.integer_linear import group_dim, grouped_weight, index_spec, unpack_outputs
from pymllm.quantization.storage.packing import (
    pack_nibbles_low_first,
    pack_words,
    refuse_nan_scales,
    refuse_wide_codes,
    unpack_nibbles_low_first,
    unpack_words,
)
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec, whole

NAME = "compressed-tensors"
MX_GROUP = 32
INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class FloatQuantizedLinearMethod(E4M3LinearMethod):
    """float8 weights; with exponent_bytes, mxfp8.  The fields are `E4M3LinearMethod`'s."""

    name: ClassVar[str] = NAME

    def describe(self) -> str:
        return f"{NAME} mxfp8, activations {self.activations}" if self.exponent_bytes else super().describe()


@dataclass(frozen=True)
class IntQuantizedLinearMethod(LinearMethodBase):
    """Integer weights: signed bytes, or (packed) codes raised by 2^(bits-1) in words.  w = (code - zero point) * scale.

    group_size: how many inputs share a scale; 0: the whole row.  per_tensor: whether all rows share one scale.
    index: whether a weight_g_idx is stored, and whether it is in order.  has_shape: whether a weight_shape is stored.
    """

    bits: int
    group_size: int
    symmetric: bool
    packed: bool
    per_tensor: bool = False
    activations: Activations = "float"
    scale_dtype: torch.dtype = torch.float32
    index: Literal["absent", "in order", "act order"] = "absent"
    has_shape: bool = True
    name: ClassVar[str] = NAME

    @property
    def fuses(self) -> bool:
        # Otherwise each part has an order of its own, or a zero point of its own for its activations.
        return self.index != "act order" and self.activations != "static asym"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        groups = group_dim(self.group_size, shape, indexed=self.index == "act order")
        grid: tuple[Dim, ...] = (PART,) if self.per_tensor else (OUT, groups)
        # AutoRound gives symmetric scales the sign of the group's peak; zero points take a positive one.
        scale: Any = "signed" if self.symmetric else True
        specs = [WeightSpec("weight_scale", self.scale_dtype, grid, accepts=FLOATS, scale=scale)]
        # In bytes, a code or zero point may have more bits than the config says.
        refuse = refuse_wide_codes(self.bits)
        if self.packed:
            specs.append(WeightSpec("weight_packed", torch.int32, (OUT, IN.in_words(self.bits))))
            if self.has_shape:
                specs.append(_shape_spec())
        else:
            specs.append(WeightSpec("weight", torch.int8, (OUT, IN), refuse=refuse))
        if not self.symmetric and self.packed and not self.per_tensor:
            specs.append(WeightSpec("weight_zero_point", torch.int32, (OUT.in_words(self.bits), groups)))
        elif not self.symmetric:
            specs.append(WeightSpec("weight_zero_point", torch.int8, grid, refuse=refuse))
        if self.index != "absent":
            in_order = self.index == "in order"
            specs.append(index_spec("weight_g_idx", self.group_size, in_order=in_order))
        if self.activations in ("static", "static asym"):
            specs.append(WeightSpec("input_scale", torch.float32, (PART,), accepts=FLOATS, scale=True))
        if self.activations == "static asym":
            specs.append(WeightSpec("input_zero_point", torch.int8, (PART,)))
        return tuple(specs)

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        middle = 2 ** (self.bits - 1)
        if self.packed:
            codes = unpack_words(tensors["weight_packed"], self.bits)[:, : shape.in_features_local]
        else:
            codes = tensors["weight"].view(torch.uint8) + middle  # wraps, as two's complement does
            codes = codes & (2**self.bits - 1)
        zeros = None
        if not self.symmetric:
            stored = tensors["weight_zero_point"]
            if stored.dtype is torch.int32:
                zeros = unpack_outputs(stored.t(), self.bits, shape)
            else:
                zeros = self._rows((stored.view(torch.uint8) + middle) & (2**self.bits - 1), shape)
        return grouped_weight(
            codes.contiguous(),
            self._rows(tensors["weight_scale"], shape),
            zeros,
            self.bits,
            self.group_size,
            shape,
            index=tensors["weight_g_idx"] if self.index == "act order" else None,
            activations=self.activations,
            input_scales=tensors.get("input_scale"),
            input_zeros=tensors.get("input_zero_point"),
        )

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        if self.per_tensor or self.index != "absent":
            return super().to_stored(weight, shape)
        assert isinstance(weight, IntWeight)
        tensors = {"weight_scale": weight.scales.to(self.scale_dtype).contiguous()}
        if self.packed:
            tensors["weight_packed"] = pack_words(weight.codes, self.bits)
            tensors["weight_shape"] = torch.tensor(weight.shape)
        else:
            tensors["weight"] = _as_signed(weight.codes, self.bits)
        if weight.zeros is not None and self.packed:
            tensors["weight_zero_point"] = pack_words(weight.zeros.t(), self.bits).t().contiguous()
        elif weight.zeros is not None:
            tensors["weight_zero_point"] = _as_signed(weight.zeros, self.bits)
        if self.activations == "static":
            assert weight.input_scales is not None
            tensors["input_scale"] = weight.input_scales.float().reshape(1)
        return tensors

    def _rows(self, values: Tensor, shape: LinearShape) -> Tensor:
        """Give each part's value [P] to its rows, [O, 1]; return values of groups [O, I/G] as they are."""
        return rows_of_parts(values, shape).unsqueeze(1) if self.per_tensor else values

    def describe(self) -> str:
        groups = f"g{self.group_size}" if self.group_size else "per channel"
        groups = "per tensor" if self.per_tensor else groups
        order = " in act order" if self.index == "act order" else ""
        zeros = "sym" if self.symmetric else "asym"
        return f"{NAME} int{self.bits} {groups} {zeros}{order}, activations {self.activations}"


@dataclass(frozen=True)
class Fp4LinearMethod(LinearMethodBase):
    """e2m1 weights.  nvfp4: an e4m3 scale for 16 inputs, over a global scale; mxfp4: a power of two for 32 inputs.

    activations: "group": they are rounded to the same type, in groups of the same size.
    global_activations: whether input_global_scale is stored.
    """

    kind: Literal["nvfp4", "mxfp4"]
    activations: Activations = "float"
    global_activations: bool = False
    scale_dtype: torch.dtype = torch.uint8
    name: ClassVar[str] = NAME

    @property
    def group_size(self) -> int:
        return 16 if self.kind == "nvfp4" else 32

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        grid = (OUT, IN.every(self.group_size))
        specs = [WeightSpec("weight_packed", torch.uint8, (OUT, IN.packed(2)))]
        if self.kind == "nvfp4":
            # A block of zeros may have the scale zero.
            specs.append(WeightSpec("weight_scale", torch.float8_e4m3fn, grid, scale="or zero"))
            specs.append(WeightSpec("weight_global_scale", torch.float32, (PART,), scale=True))
        else:
            specs.append(WeightSpec("weight_scale", self.scale_dtype, grid, refuse=refuse_nan_scales))
        if self.global_activations:
            specs.append(WeightSpec("input_global_scale", torch.float32, (PART,), scale=True))
        return tuple(specs)

    def check(self, shape: LinearShape) -> None:
        check_groups(self.group_size, shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        codes, scales = unpack_nibbles_low_first(tensors["weight_packed"]), tensors["weight_scale"]
        rows = None
        if self.kind == "mxfp4":
            scales = scales.view(torch.float8_e8m0fnu)
        else:
            rows = rows_of_parts(tensors["weight_global_scale"].reciprocal(), shape)
        return e2m1_weight(codes, scales, rows, self.activations, tensors.get("input_global_scale"))

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, CodebookWeight)
        tensors = {"weight_packed": pack_nibbles_low_first(weight.codes)}
        if self.kind == "mxfp4":
            tensors["weight_scale"] = weight.scales.view(torch.uint8).contiguous()
        else:
            assert weight.row_scales is not None
            tensors["weight_scale"] = weight.scales.contiguous()
            tensors["weight_global_scale"] = exact_reciprocal(
                weight.row_scales[:1], shape, "weight_global_scale"
            )
        if self.global_activations:
            assert weight.input_scales is not None
            tensors["input_global_scale"] = weight.input_scales.float().reshape(1)
        return tensors

    def describe(self) -> str:
        return f"{NAME} {self.kind}, activations {self.activations}"


def _as_signed(codes: Tensor, bits: int) -> Tensor:
    """Shift codes 0..2^bits-1 to int8 around zero."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _shape_spec() -> WeightSpec:
    """Make the spec of the stored shape, which writers keep in integers of various widths."""
    return WeightSpec("weight_shape", torch.int64, (PART, whole(2)), accepts=INTEGERS, refuse=_refuse_shape)


def _refuse_shape(stored: Tensor, shape: LinearShape) -> str | None:
    """Refuse a stored shape that is not the layer's."""
    expected = [shape.out_features, shape.in_features]
    found = stored.flatten().tolist()
    return None if found == expected else f"the shape {found}, where the layer has {expected}"
