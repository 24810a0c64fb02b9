"""The canonical layouts: every format is converted to one of them, and every kernel packs from them.

A family of weights is one dataclass.  All have their outputs first, `[O, I]`, and `dequantize(dtype)`.  `type` is all
that a kernel needs to know of a weight before it sees one: a plan makes the same objects on the meta device, so that it
asks the same kernels.
"""

# O out_features, I in_features, G group_size, P parts of a fused layer

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn

# The (outputs, inputs) that share a scale, where 0 is the whole axis: one for the weight, one for each output.
TENSOR, CHANNEL = (0, 0), (1, 0)

# The ways in which a checkpoint may want activations rounded; `kernels/activations.py` says what each one is.
# fmt: off
Activations = Literal[
    "float", "token", "tensor", "static", "group",
    "token asym", "tensor asym", "static asym", "token asym reciprocal", "token fp8", "static fp8", "group mx",
    "token product", "tensor product", "token product asym",
]
# fmt: on
# Those that round to codes of the weight's own kind, without zero points.
SYMMETRIC_ACTIVATIONS = ("token", "tensor", "static", "group")


@dataclass(frozen=True)
class DenseType:
    """Plain floats."""

    dtype: torch.dtype
    family: str = "dense"

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class IntType:
    """Integer codes with a scale for every group of inputs.

    symmetric: the zero point is the middle code everywhere.  offsets: a float is added, in place of a zero point that
    is subtracted.  indexed: inputs name their groups one by one, instead of lying in order.
    activations: how the checkpoint wants activations quantised, to int8 ("float": not at all).
    scales: the dtype of the scales.
    """

    bits: int
    group_size: int
    symmetric: bool
    offsets: bool = False
    indexed: bool = False
    activations: Activations = "float"
    scales: torch.dtype = torch.float16
    family: str = "int"

    @property
    def plain(self) -> bool:
        """True for integer zero points (or none) and groups in order, which fast kernels take."""
        return not self.offsets and not self.indexed

    def __str__(self) -> str:
        zeros = "offsets" if self.offsets else "sym" if self.symmetric else "asym"
        order = " in act order" if self.indexed else ""
        activations = "" if self.activations == "float" else f", activations {self.activations}"
        return f"int{self.bits} g{self.group_size} {zeros}{order}{activations}"


@dataclass(frozen=True)
class CodebookType:
    """4-bit codes that name one of sixteen values, with a scale for every group of inputs.

    codebook: the table's name ("nf4", "e2m1", ...).  activations: as for IntType, but quantised as the format says.
    scales: the dtype of the scales.
    """

    codebook: str
    group_size: int
    activations: Activations = "float"
    scales: torch.dtype = torch.float32
    family: str = "codebook"

    def __str__(self) -> str:
        activations = "" if self.activations == "float" else f", activations {self.activations}"
        return f"{self.codebook} g{self.group_size}{activations}"


@dataclass(frozen=True)
class Fp8Type:
    """float8_e4m3 with a scale for every block of (outputs, inputs); 0: the whole axis.

    activations: how the checkpoint wants activations quantised ("float": not at all).
    """

    block: tuple[int, int]
    activations: Activations
    family: str = "fp8"

    def __str__(self) -> str:
        granularity = {TENSOR: "tensor", CHANNEL: "channel"}.get(
            self.block, f"block {self.block[0]}x{self.block[1]}"
        )
        return f"fp8 e4m3 per {granularity}, activations {self.activations}"


WeightType = DenseType | IntType | Fp8Type | CodebookType


@dataclass(frozen=True)
class DenseWeight:
    """Plain floats.  weight: [O, I] in a float dtype."""

    weight: Tensor

    @property
    def type(self) -> DenseType:
        return DenseType(self.weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


@dataclass(frozen=True)
class IntWeight:
    """Integer codes: w = (code - zero) * scale, or code * scale + offset.

    codes: [O, I] uint8, 0..2**bits-1.  scales: [O, I/G] float.
    zeros: [O, I/G] uint8, or None: 2**(bits-1) everywhere.
    offsets: [O, I/G] float, in place of zeros.
    group_index: [I] int32, the group of each input, where groups do not lie in order; group_size is then nominal.
    input_order: [I] int64; column j multiplies input input_order[j].  `bind` takes it off before a kernel packs.
    input_scales: [P] float32, for activations "static".  input_zeros: [P], for "static asym".
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    offsets: Tensor | None = None
    group_index: Tensor | None = None
    input_order: Tensor | None = None
    activations: Activations = "float"
    input_scales: Tensor | None = None
    input_zeros: Tensor | None = None

    @property
    def type(self) -> IntType:
        return IntType(
            self.bits,
            self.group_size,
            self.zeros is None and self.offsets is None,
            self.offsets is not None,
            self.group_index is not None,
            self.activations,
            self.scales.dtype,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Compute the weight, [O, I] in `dtype`.  Products are taken in `dtype`, at least in float32."""
        compute = torch.promote_types(dtype, torch.float32)
        weight = self._grouped(self.codes).to(compute)
        scales = self._per_input(self.scales).to(compute)
        if self.offsets is not None:
            weight = weight * scales + self._per_input(self.offsets).to(compute)
        else:
            zero = 2 ** (self.bits - 1) if self.zeros is None else self._per_input(self.zeros).to(compute)
            weight = (weight - zero) * scales
        weight = weight.view(self.shape)
        if self.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_order, weight)
        return weight.to(dtype)

    def _grouped(self, codes: Tensor) -> Tensor:
        """Reshape [O, I] codes to [O, I/G, G] where groups lie in order; else return them as they are."""
        if self.group_index is not None:
            return codes
        return codes.view(codes.shape[0], self.scales.shape[1], self.group_size)

    def _per_input(self, groups: Tensor) -> Tensor:
        """Make [O, I/G] values of groups broadcastable to `_grouped` codes."""
        return groups.unsqueeze(-1) if self.group_index is None else groups[:, self.group_index.long()]

    def tensors(self) -> dict[str, Tensor]:
        names = ("codes", "scales", "zeros", "offsets", "group_index", "input_scales", "input_zeros")
        return _present(self, *names)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        *,
        bits: int,
        group_size: int,
        symmetric: bool,
        range_factors: tuple[Tensor | float, Tensor | float] = (1.0, 1.0),
    ) -> IntWeight:
        """Round a weight, [O, I], to the nearest codes.  group_size divides I (0 or less: one group a row).

        Asymmetric groups span minimum to maximum and always hold zero exactly.  Scales are float16, the dtype that
        the formats of this family store; codes are chosen against the rounded scale.
        range_factors: the factors of the low and the high end of each range, numbers or [O, I/G].
        """
        out_features, in_features = weight.shape
        low_factor, high_factor = range_factors
        group_size = group_size if group_size > 0 else in_features
        groups = weight.float().view(out_features, in_features // group_size, group_size)
        top = 2**bits - 1
        smallest = torch.finfo(torch.float16).smallest_normal
        if symmetric:
            middle = 2 ** (bits - 1)
            peak = groups.abs().amax(-1) * high_factor
            scales = (peak / (middle - 0.5)).clamp(smallest, torch.finfo(torch.float16).max).half()
            offset: Tensor | int = middle
            zeros = None
        else:
            low = groups.amin(-1).clamp(max=0) * low_factor
            high = groups.amax(-1).clamp(min=0) * high_factor
            scales = ((high - low) / top).clamp(smallest, torch.finfo(torch.float16).max).half()
            zeros = (-low / scales.float()).round().clamp(0, top).to(torch.uint8)
            offset = zeros.unsqueeze(-1).float()
        codes = (groups / scales.float().unsqueeze(-1)).round().add(offset).clamp(0, top).to(torch.uint8)
        return cls(codes.view(out_features, in_features), scales, zeros, bits, group_size)


@dataclass(frozen=True)
class Fp8Weight:
    """float8_e4m3 codes: w = weight * scale of its block.

    weight: [O, I] float8_e4m3fn.  scales: [ceil(O/block_out), ceil(I/block_in)] float32; a block side of 0 is the axis.
    input_scales: [P] float32, one for each part, where activations are "static"; part_sizes: the outputs of each part.
    """

    weight: Tensor
    scales: Tensor
    block: tuple[int, int]
    activations: Activations = "float"
    input_scales: Tensor | None = None
    part_sizes: tuple[int, ...] = ()

    @property
    def type(self) -> Fp8Type:
        return Fp8Type(self.block, self.activations)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Compute the weight, [O, I] in `dtype`.  Products are taken in `dtype`, at least in float32."""
        compute = torch.promote_types(dtype, torch.float32)
        return (self.weight.to(compute) * self.expanded_scales().to(compute)).to(dtype)

    def expanded_scales(self) -> Tensor:
        """Repeat the scales along the sides of their blocks.  Returns a tensor broadcastable to [O, I]."""
        scales = self.scales
        for axis, side in enumerate(self.block):
            if side > 1:
                scales = scales.repeat_interleave(side, dim=axis).narrow(axis, 0, self.shape[axis])
        return scales

    def tensors(self) -> dict[str, Tensor]:
        return _present(self, "weight", "scales", "input_scales")

    @classmethod
    def from_parts(
        cls,
        weight: Tensor,
        scales: Tensor,
        block: tuple[int, int],
        part_sizes: Sequence[int],
        activations: Activations,
        input_scales: Tensor | None,
    ) -> Fp8Weight:
        """Bring parts that lie side by side, each with scales of its own, under one block size.

        scales: one for each part ([P]), or each part's grid of blocks, one above the other. Where parts do not end on
        a block, or have one scale each, every row gets a scale of its own; no value changes.
        """
        sizes = tuple(part_sizes)
        side = block[0]
        if scales.ndim == 1:
            scales = scales.unsqueeze(1)
        if len(sizes) > 1 and (side == 0 or any(size % side for size in sizes[:-1])):
            counts = [1 if side == 0 else -(-size // side) for size in sizes]
            pieces = [
                piece.repeat_interleave(side or size, dim=0)[:size]
                for piece, size in zip(scales.split(counts), sizes, strict=True)
            ]
            scales, block = torch.cat(pieces), (1, block[1])
        sides = (block[0], 0 if block[1] >= weight.shape[1] else block[1])
        return cls(weight, scales, sides, activations, input_scales, sizes)

    @classmethod
    def from_float(cls, weight: Tensor, *, block: tuple[int, int], activations: Activations) -> Fp8Weight:
        """Scale the largest magnitude of each block of a weight, [O, I], to 448 and round to nearest."""
        out_features, in_features = weight.shape
        side_out, side_in = block[0] or out_features, block[1] or in_features
        rows, columns = -(-out_features // side_out), -(-in_features // side_in)
        padded = torch.nn.functional.pad(
            weight.float(), (0, columns * side_in - in_features, 0, rows * side_out - out_features)
        )
        blocks = padded.view(rows, side_out, columns, side_in)
        scales = (blocks.abs().amax(dim=(1, 3)) / E4M3_MAX).clamp(
            min=torch.finfo(torch.float32).smallest_normal
        )
        codes = to_e4m3(blocks / scales[:, None, :, None])
        codes = codes.view(rows * side_out, columns * side_in)[:out_features, :in_features].contiguous()
        return cls(codes, scales, block, activations)


@dataclass(frozen=True)
class CodebookWeight:
    """Codes of a codebook: w = table[code] * scale * row_scale.

    codes: [O, I] uint8, 0..15.  table: [16] float32.  scales: [O, I/G], any float dtype (fp8 scales stay fp8).
    row_scales: [O] float32, the second level of two-level scales; None: 1.
    """

    codes: Tensor
    table: Tensor
    scales: Tensor
    codebook: str
    group_size: int
    row_scales: Tensor | None = None
    activations: Activations = "float"
    input_scales: Tensor | None = None

    @property
    def type(self) -> CodebookType:
        return CodebookType(self.codebook, self.group_size, self.activations, self.scales.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Compute the weight, [O, I] in `dtype`.  Products are taken in `dtype`, at least in float32."""
        compute = torch.promote_types(dtype, torch.float32)
        scales = self.scales.to(compute)
        if self.row_scales is not None:
            scales = scales * self.row_scales.to(compute).unsqueeze(1)
        values = self.table.to(compute)[self.codes.int()]
        return (values * scales.repeat_interleave(self.group_size, dim=1)[:, : self.shape[1]]).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        return _present(self, "codes", "table", "scales", "row_scales", "input_scales")


CanonicalWeight = DenseWeight | IntWeight | Fp8Weight | CodebookWeight


def _present(weight: Any, *names: str) -> dict[str, Tensor]:
    """Collect those of a weight's tensors that it has."""
    return {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}


def on_meta(weight: CanonicalWeight) -> CanonicalWeight:
    """Return the same weight without data, to count the bytes that a kernel's packing would take."""
    tensors = {
        field.name: value.to("meta") if isinstance(value, Tensor) else value
        for field in dataclasses.fields(weight)
        for value in (getattr(weight, field.name),)
    }
    return type(weight)(**tensors)  # type: ignore[arg-type]


NAN_PIECE = 1 << 18  # bytes that are looked at together: they stay in a core's cache between two operations


def has_nan_e4m3(codes: Tensor) -> bool:
    """Tell whether float8_e4m3fn numbers, contiguous, have NaN among them: a magnitude of 127 as a byte."""
    pieces = codes.reshape(-1).view(torch.uint8).split(NAN_PIECE)
    return any(int((piece & 0x7F).max()) == 0x7F for piece in pieces if piece.numel())


def to_e4m3(values: Tensor) -> Tensor:
    """Round floats to the nearest float8_e4m3fn; beyond ±448 to ±448, where torch would make NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Compute |got - want| / |want| in the Frobenius norm; |got - want| where `want` is zero."""
    norm = float(want.norm())
    return float((got - want).norm()) / (norm if norm > 0 else 1.0)
