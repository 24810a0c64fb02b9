"""Tensors as data: which logical axis each stored dimension follows, and how coarse it is.

A format says what it stores with `WeightSpec`s; everything about sharding follows from them. AWQ with groups of G is

    WeightSpec("qweight", torch.int32, (IN, OUT.packed(8)))           # [I, O/8]
    WeightSpec("qzeros", torch.int32, (IN.every(G), OUT.packed(8)))  # [I/G, O/8]
    WeightSpec("scales", torch.float16, (IN.every(G), OUT))            # [I/G, O]

and a scale for each tensor is `(PART,)`: one element for each of the checkpoint's tensors that a layer fuses. The
experts of a layer have the same tensors once more along an axis `EXPERT`, which `ExpertsShape.spec` puts first.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from pymllm.errors import ConfigError, ShardingError


class Axis(enum.Enum):
    """The logical axis whose elements a stored dimension counts."""

    OUT = "output features"
    IN = "input features"
    PART = "parts of a fused layer"  # absent in the checkpoint, where every part has a tensor of its own
    EXPERT = "experts"  # absent in checkpoints where every expert has a tensor of its own
    WHOLE = "elements that are never divided"


@dataclass(frozen=True)
class Dim:
    """One stored dimension: an element covers `granule` logical elements of `axis` (0: all of them).

    size: the stored size of a WHOLE dimension, which no layer shape determines.
    apart: whether an element holds its logical ones apart, side by side, instead of one value that they share.
    count: how many elements together cover the granule.
    spread: every rank holds the whole dimension, as each stored element has logical ones from all over the axis.
    flat: where not 0, the whole weight is laid out along this dimension, row after row, with one element for every
    `flat` values; `of_rows` turns that into a granule and a count.
    """

    axis: Axis
    granule: int = 1
    size: int = 0
    apart: bool = False
    count: int = 1
    flat: int = 0
    spread: bool = False

    def every(self, granule: int) -> Dim:
        """Store one element for `granule` logical ones; 0 or less: one for the whole axis."""
        return replace(self, granule=max(granule, 0))

    def packed(self, count: int) -> Dim:
        """Pack `count` logical elements in each stored one, which no rank can hold in part."""
        return replace(self, granule=count, apart=True)

    def in_words(self, bits: int) -> Dim:
        """Store the axis as fields of `bits` bits, one after the other in 32-bit words, some across two of them."""
        common = math.gcd(32, bits)
        return replace(self, granule=32 // common, count=bits // common, apart=True)

    def in_blocks(self, values: int, size: int) -> Dim:
        """Store the axis in blocks: `values` logical elements in `size` stored ones (bytes, say)."""
        return replace(self, granule=values, count=size, apart=True)

    def flattened(self, per: int) -> Dim:
        """Lay the whole weight flat along this axis, row after row, with one stored element for every `per` values."""
        return replace(self, flat=per)

    def undivided(self) -> Dim:
        """Let every rank hold the dimension in full."""
        return replace(self, spread=True)

    def of_rows(self, length: int) -> Dim:
        """Settle a flat dimension for rows of `length` values; any other dimension stays as it is.

        The granule becomes the fewest rows that end where a stored element ends, the count their stored elements.
        """
        if not self.flat:
            return self
        together = math.lcm(length, self.flat)
        return replace(self, granule=together // max(length, 1), count=together // self.flat, flat=0)

    def stored(self, logical: int) -> int:
        """Count the stored elements that cover `logical` ones."""
        return 1 if self.granule == 0 else -(-logical * self.count // self.granule)


def check_granule(dim: Dim, logical: int, name: str) -> None:
    """Refuse groups or blocks whose size the stored tensor cannot contradict.

    logical: the elements of the axis.  name: the tensor's.  ConfigError for a last group that is short where no writer
    makes groups of that size: for 33, say, there would be as many scales as for 32.
    """
    size = dim.granule
    if dim.apart or dim.flat or not 1 < size < logical or not logical % size or not size & (size - 1):
        return
    raise ConfigError(
        f"groups of {size} do not divide the {logical} {dim.axis.value}",
        code="group-size",
        tensor=name,
        expected=f"a divisor of {logical}, or a power of two",
        found=str(size),
        fix="Correct the size of groups or blocks in the checkpoint's settings.",
    )


OUT, IN, PART, EXPERT = Dim(Axis.OUT), Dim(Axis.IN), Dim(Axis.PART), Dim(Axis.EXPERT)


def whole(size: int) -> Dim:
    """Make a dimension of `size` elements that every rank holds in full."""
    return Dim(Axis.WHOLE, size=size)


# The dtypes that a float parameter may be read from: `dtype=` asks for a conversion between them.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WeightSpec:
    """One tensor of a layer, as the checkpoint stores it.

    name: the tensor's suffix after the layer's name.  dtype: that of the parameter.
    accepts: further dtypes that the checkpoint may have, converted on reading.
    aliases: other suffixes that checkpoints of the format use for the tensor.
    scale: whether the tensor is a scale, which must be finite and above 0; "or zero": it may be 0, as that of a block
    of zeros; "signed": it may be below 0, as AutoRound's symmetric integers have it, but not 0.
    packed: whether elements hold codes, whatever dtype they are declared to have: floats need not be finite then.
    refuse: is given what was read and the part's shape, and returns why that cannot be right, or None.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[Dim, ...]
    accepts: tuple[torch.dtype, ...] = ()
    aliases: tuple[str, ...] = ()
    scale: bool | Literal["or zero", "signed"] = False
    packed: bool = False
    refuse: Callable[[Tensor, LinearShape], str | None] | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the checkpoint's tensor may have, the parameter's own first."""
        return tuple(dict.fromkeys((self.dtype, *self.accepts)))

    def source_shape(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """Return the full shape of one part's tensor in the checkpoint."""
        sizes = {Axis.OUT: out_features, Axis.IN: in_features}
        return tuple(
            dim.size if dim.axis is Axis.WHOLE else dim.of_rows(in_features).stored(sizes[dim.axis])
            for dim in self.dims
            if dim.axis not in (Axis.PART, Axis.EXPERT)
        )


@dataclass(frozen=True)
class Span:
    """A rank's share of an axis: elements start..stop of total, then `padding` that the checkpoint lacks."""

    start: int
    stop: int
    total: int
    padding: int = 0

    @classmethod
    def full(cls, total: int) -> Span:
        return cls(0, total, total)

    @classmethod
    def even(cls, total: int, rank: int, size: int, what: str) -> Span:
        """Return share `rank` of `size` equal shares.

        Raises ShardingError, which names `what` and the sizes that do divide `total`, where `size` does not.
        """
        if total % size:
            legal = [s for s in range(1, total + 1) if total % s == 0 and s <= 4 * size]
            raise ShardingError(
                f"{what}: {total} cannot be divided over {size} tensor-parallel ranks",
                code="tp-size",
                expected="a tensor-parallel size that divides it",
                found=str(size),
                fix=f"Sizes that do: {', '.join(map(str, legal))}.",
            )
        share = total // size
        return cls(rank * share, (rank + 1) * share, total)

    @property
    def size(self) -> int:
        return self.stop - self.start + self.padding

    def stored(self, dim: Dim, what: str) -> Span:
        """Count the same share in stored elements.  what: the tensor's name, for the error.

        An edge lies on a granule, or is the axis' end, or the whole span lies within one granule of a shared value,
        which is then held by every rank that needs it.  Anything else is a ShardingError.
        """
        granule, count = dim.granule or self.total, dim.count
        total = dim.stored(self.total)
        padding = -(-self.padding * count // granule)
        if dim.spread:
            return Span(0, total, total, padding)
        if self.start == self.stop:
            return Span(0, 0, total, padding)
        if self.start % granule == 0 and (self.stop % granule == 0 or self.stop == self.total):
            return Span(self.start // granule * count, -(-self.stop * count // granule), total, padding)
        if self.start // granule == (self.stop - 1) // granule and not self.padding and not dim.apart:
            first = self.start // granule * count
            return Span(first, min(first + count, total), total)
        raise ShardingError(
            f"{what}: this rank would take {dim.axis.value} {self.start}:{self.stop}, "
            f"which splits a group of {granule}",
            code="tp-granule",
            expected=f"edges at multiples of {granule}",
            found=f"{self.start}:{self.stop} of {self.total}",
        )


def refuse_sizes(layer: str, **sizes: Sequence[Any]) -> None:
    """Raise ConfigError if a size of a layer is no whole number of at least 1, or if a list of sizes is empty."""
    for name, values in sizes.items():
        bad = [value for value in values if not isinstance(value, Integral) or value < 1]
        if bad or not values:
            raise ConfigError(
                f"{layer}: {name} is not a size that a layer can have",
                code="layer-size",
                expected="a whole number of at least 1",
                found=repr(bad[0]) if bad else "none",
            )


def side_by_side(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Turn shares of several axes into shares of one axis, on which these lie one after the other."""
    total, starts = sum(span.total for span in spans), [0]
    for span in spans:
        starts.append(starts[-1] + span.total)
    return tuple(
        Span(at + span.start, at + span.stop, total, span.padding)
        for at, span in zip(starts[:-1], spans, strict=True)
    )


@dataclass(frozen=True)
class LinearShape:
    """The logical shape of a linear layer and this rank's share of it.

    inputs: the share of the input features.  outputs: for each fused part, the share of its output features.
    parts: the checkpoint names of the parts, one for a layer that fuses nothing. One name for several outputs: the
    checkpoint has them side by side in one tensor, and the outputs are spans of all that it holds.
    dtype: the dtype that plain float weights are kept in.
    """

    inputs: Span
    outputs: tuple[Span, ...]
    parts: tuple[str, ...]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The layer's name, for messages."""
        return " + ".join(self.parts)

    @property
    def in_features(self) -> int:
        """Input features of the whole layer."""
        return self.inputs.total

    @property
    def in_features_local(self) -> int:
        return self.inputs.size

    @property
    def out_features(self) -> int:
        """Output features of the whole layer, all parts."""
        return self.outputs[0].total if self.together else sum(span.total for span in self.outputs)

    @property
    def together(self) -> bool:
        """True where one tensor of the checkpoint holds several outputs."""
        return len(self.parts) < len(self.outputs)

    @property
    def names(self) -> tuple[str, ...]:
        """The checkpoint name of each output."""
        return self.parts * len(self.outputs) if self.together else self.parts

    @property
    def out_features_local(self) -> int:
        return sum(span.size for span in self.outputs)

    def part(self, index: int) -> LinearShape:
        """Return the shape of one part alone; where one tensor holds several outputs, of all of them."""
        if self.together:
            return self
        return replace(self, outputs=(self.outputs[index],), parts=(self.parts[index],))


@dataclass(frozen=True)
class ExpertsShape:
    """One product of a layer's experts: the shape of one expert, and which of them this rank holds.

    one: the shape of every expert; where each has tensors of its own, the names of its parts have "{}" for its index.
    ids: the experts that this rank holds.  total: how many the layer has.
    stacked: one tensor holds all experts, and the outputs of all parts, one part after the other.
    interleaved: where not 0, the tensor holds the outputs of so many parts in turns; they count as one part here, and
    `in_order` sorts them out.
    """

    one: LinearShape
    ids: tuple[int, ...]
    total: int
    stacked: bool = False
    interleaved: int = 0

    @property
    def name(self) -> str:
        return self.one.name.replace(".{}", "")

    @property
    def dtype(self) -> torch.dtype:
        return self.one.dtype

    def spec(self, spec: WeightSpec) -> WeightSpec:
        """Turn the spec of one expert's tensor into that of all experts."""
        return replace(spec, dims=(EXPERT, *spec.dims))

    def part(self, index: int) -> LinearShape:
        """Return the shape of one part of an expert alone."""
        return self.one.part(index)

    def expert(self, expert: int) -> LinearShape:
        """Return the shape of one expert, under its own names.  expert: its index in the checkpoint."""
        return replace(self.one, parts=tuple(part.format(expert) for part in self.one.parts))

    def in_order(self, spec: WeightSpec, tensor: Tensor) -> Tensor:
        """Sort the outputs of one expert's tensor by part, where they are interleaved."""
        if not self.interleaved:
            return tensor
        axis = next((i for i, dim in enumerate(spec.dims) if dim.axis is Axis.OUT), None)
        if axis is None:
            return tensor
        return (
            tensor.unflatten(axis, (-1, self.interleaved)).transpose(axis, axis + 1).flatten(axis, axis + 1)
        )
