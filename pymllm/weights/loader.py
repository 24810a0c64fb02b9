"""The one loader: cuts any tensor for any rank and part, from its `WeightSpec` alone.

`Slot` says where one checkpoint tensor (or one rank's slice of it) goes in a parameter.  `place` makes the slots of a
layer's parameter, `copy_full_tensor` serves `weight_loader(param, tensor, shard_id)`, and `Written` proves that every
element of a parameter is written exactly once.  Slots and Written hang on the parameter: `track` puts them there,
`slots_of` and `written_of` read them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import CheckpointError
from pymllm.weights.spec import Axis, ExpertsShape, LinearShape, Span, WeightSpec, check_granule

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Slot:
    """The place of one part's tensor: `source` cuts this rank's slice in the checkpoint, `target` in the parameter.

    prefix: the part's checkpoint name.  part: its index among the parts of a fused layer.
    source_shape: the tensor's full shape in the checkpoint.  together: the tensor holds the layer's other parts, too.
    expert: the index of the slot's expert in a parameter of several, whose axis the checkpoint's tensor then lacks.
    stored_as: the names that the tensor may have, where they do not follow from the prefix and the spec.
    """

    prefix: str
    spec: WeightSpec
    part: int
    source_shape: tuple[int, ...]
    source: Index
    target: Index
    together: bool = False
    expert: int | None = None
    stored_as: tuple[str, ...] = ()

    @property
    def tensor(self) -> str:
        """The tensor's checkpoint name."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor's checkpoint name, then the other spellings that the format knows."""
        if self.stored_as:
            return self.stored_as
        suffixes = (self.spec.name, *self.spec.aliases)
        return tuple(f"{self.prefix}.{suffix}" if self.prefix else suffix for suffix in suffixes)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's slice, as cut from the checkpoint."""
        return tuple(cut.stop - cut.start for cut in self.source)

    @property
    def elements(self) -> int:
        return math.prod(self.local_shape)

    def view(self, param: Tensor) -> Tensor:
        """Return the part of the parameter that the slice fills."""
        target = param[self.target] if self.target else param
        return target if self.expert is None else target[0]


def place(spec: WeightSpec, shape: LinearShape) -> tuple[tuple[int, ...], list[Slot]]:
    """Return the shape of this rank's parameter for `spec`, and one slot for each part.

    Parts lie side by side along OUT and PART dimensions.  Raises ShardingError where the rank's edges split a granule.
    """
    slots: list[Slot] = []
    local = [0] * len(spec.dims)
    by_part = any(dim.axis in (Axis.OUT, Axis.PART) for dim in spec.dims)
    for part, (outputs, prefix) in enumerate(zip(shape.outputs, shape.names, strict=True)):
        if shape.together and part and not by_part:
            break  # one tensor holds all parts, and has this dimension once
        name = f"{prefix}.{spec.name}" if prefix else spec.name
        source: list[slice] = []
        target: list[slice] = []
        for axis_index, dim in enumerate(spec.dims):
            if dim.axis is Axis.PART:
                target.append(slice(part, part + 1))
                local[axis_index] = len(shape.outputs)
                continue
            if dim.axis is Axis.WHOLE:
                span = Span.full(dim.size)
            else:
                rows = dim.of_rows(shape.in_features)
                check_granule(dim, outputs.total if dim.axis is Axis.OUT else shape.in_features, name)
                span = (outputs if dim.axis is Axis.OUT else shape.inputs).stored(rows, name)
            source.append(slice(span.start, span.stop))
            offset = local[axis_index] if dim.axis is Axis.OUT else 0
            target.append(slice(offset, offset + span.stop - span.start))
            local[axis_index] = offset + span.size
        full = spec.source_shape(shape.in_features, outputs.total)
        slots.append(Slot(prefix, spec, part, full, tuple(source), tuple(target), shape.together))
    return tuple(local), slots


def place_experts(spec: WeightSpec, shape: ExpertsShape) -> tuple[tuple[int, ...], list[Slot]]:
    """Return the shape of this rank's parameter for `spec` (one expert's tensor), and its slots.

    Every expert and part has a slot; in a stacked checkpoint every part has one, which holds all experts.
    """
    one, parts = place(spec, shape.one)
    start, count = (shape.ids or (0,))[0], len(shape.ids)
    whole_spec = shape.spec(spec)
    if shape.stacked:
        slots = [
            replace(
                slot,
                spec=whole_spec,
                source_shape=(shape.total, *slot.source_shape),
                source=(slice(start, start + count), *slot.source),
                target=(slice(0, count), *slot.target),
                stored_as=stacked_names(slot.prefix, (spec.name, *spec.aliases)),
            )
            for slot in parts
        ]
    else:
        slots = [
            replace(
                slot,
                prefix=slot.prefix.format(expert),
                spec=whole_spec,
                target=(slice(index, index + 1), *slot.target),
                expert=index,
            )
            for index, expert in enumerate(shape.ids)
            for slot in parts
        ]
    return (count, *one), slots


def stacked_names(prefix: str, suffixes: Iterable[str]) -> tuple[str, ...]:
    """List the names that a tensor of stacked experts may have.

    `experts.down_proj` is the weight itself; to it belong `experts.down_proj_scale` (or `.weight_scale`),
    `experts.down_proj_blocks` and so on.
    """
    names: list[str] = []
    for suffix in suffixes:
        short = suffix.removeprefix("weight").removeprefix("_")
        names += [f"{prefix}_{short}" if short else prefix, f"{prefix}.{suffix}"]
    return tuple(names)


STACKED_NAME = re.compile(
    r"(?P<product>.+\.(?:gate_up_proj|gate_proj|up_proj|down_proj))(?:_(?P<suffix>\w+))?"
)


class OneOfStack:
    """One expert's share of a stacked tensor, as far as a format looks at it: dtype and shape."""

    def __init__(self, stacked: Any) -> None:
        self.dtype, self.shape = stacked.dtype, tuple(stacked.shape[1:])


def with_stack_members(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Add the tensors of stacked experts a second time, under the names that one expert's own would have.

    Formats look for `experts.down_proj.weight_scale`, say, where the checkpoint has `experts.down_proj_scale`.
    """
    members: dict[str, Any] = {}
    for name, tensor in tensors.items():
        found = STACKED_NAME.fullmatch(name)
        if found is None:
            continue
        suffix = found["suffix"]
        spelled = ("weight",) if suffix is None else (suffix, f"weight_{suffix}")
        members |= {f"{found['product']}.{s}": OneOfStack(tensor) for s in spelled}
    return {**tensors, **members} if members else dict(tensors)


class Written:
    """The regions of a parameter that have been written; a second write to an element is an error."""

    def __init__(self) -> None:
        # By their slice of the first dimension, along which hundreds of experts may lie: a slice of one is compared
        # with the regions of that one alone.
        self.by_first: dict[tuple[int, int], list[Index]] = {}
        self.all_single = True

    @property
    def regions(self) -> list[Index]:
        return [region for regions in self.by_first.values() for region in regions]

    def add(self, region: Index, tensor: str) -> None:
        """Count a write of `tensor` to the region.  CheckpointError if any element of it has been written."""
        self.refuse_twice(region, tensor)
        first = _first(region)
        self.all_single &= first[1] - first[0] == 1
        self.by_first.setdefault(first, []).append(region)

    def refuse_twice(self, region: Index, tensor: str) -> None:
        """Raise CheckpointError if any element of the region has been written."""
        first = _first(region)
        single = self.all_single and first[1] - first[0] == 1
        for other in self.by_first.get(first, []) if single else self.regions:
            if all(a.start < b.stop and b.start < a.stop for a, b in zip(region, other, strict=True)):
                raise CheckpointError(
                    "its place in the layer has been written already",
                    code="written-twice",
                    tensor=tensor,
                    expected="every element of the parameter written exactly once",
                    found=f"a second write to its elements {_show(region)}",
                )

    @property
    def elements(self) -> int:
        return sum(math.prod(cut.stop - cut.start for cut in region) for region in self.regions)

    def clear(self) -> None:
        self.by_first.clear()


def track(param: Tensor, slots: list[Slot] | None) -> None:
    """Give a parameter (or buffer) its slots, and count its writes from now on.

    slots: the places of the checkpoint's tensors in it; None: they are not known, as it has a loader of its own.
    """
    tracked: Any = param
    tracked.slots, tracked.written = slots, Written()


def slots_of(param: Tensor) -> list[Slot] | None:
    """Return the slots that `track` gave a parameter; None: it has none."""
    return getattr(param, "slots", None)


def written_of(param: Tensor) -> Written:
    """Return what counts a parameter's writes.  AttributeError for one that `track` was never given."""
    tracked: Any = param
    return tracked.written


def _first(region: Index) -> tuple[int, int]:
    return (region[0].start, region[0].stop) if region else (0, 1)


def _show(region: Index) -> str:
    return "[" + ", ".join(f"{cut.start}:{cut.stop}" for cut in region) + "]"


def same_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Tell whether two shapes are equal, where a scalar may have any number of dimensions of one element.

    So may a scalar for each of several experts: [E, 1, 1] is [E].
    """
    scalars = len(expected) <= 1 and math.prod(found) == math.prod(expected)
    return found == expected or (scalars and (math.prod(expected) == 1 or found[0] == expected[0]))


def write(param: Tensor, slot: Slot, local: Tensor, written: Written) -> None:
    """Copy this rank's slice `local` to its place in `param`, once."""
    written.add(slot.target, slot.tensor)
    view = slot.view(param)
    view.copy_(local.reshape(view.shape))


def copy_full_tensor(
    param: Tensor, slots: list[Slot], loaded: Tensor, written: Written, part: int | None, layer: str
) -> None:
    """Cut a full checkpoint tensor for this rank and write it to `param`.

    part: the index of the part that `loaded` is; None: the layer's only part, or all parts side by side along their
    output axis.  Raises CheckpointError naming layer, tensor, expected and found where shape or dtype does not fit.
    """
    pieces = [(slots[part or 0], loaded)]
    if slots[0].together:
        pieces = [(slot, loaded) for slot in slots]
    elif part is None and len(slots) > 1:
        pieces = list(zip(slots, _split_parts(slots, loaded, layer), strict=True))
    # All pieces are checked before any is written.
    for slot, piece in pieces:
        _check_piece(slot, piece, written, layer)
    for slot, piece in pieces:
        write(param, slot, piece.reshape(slot.source_shape)[slot.source], written)


def _check_piece(slot: Slot, loaded: Tensor, written: Written, layer: str) -> None:
    if not same_shape(tuple(loaded.shape), slot.source_shape):
        raise CheckpointError(
            "the shape does not fit the layer",
            code="shape",
            file=layer or None,
            tensor=slot.tensor,
            expected=str(list(slot.source_shape)),
            found=str(list(loaded.shape)),
        )
    if loaded.dtype not in slot.spec.dtypes:
        raise wrong_dtype(slot, loaded.dtype)
    written.refuse_twice(slot.target, slot.tensor)


def _split_parts(slots: list[Slot], loaded: Tensor, layer: str) -> list[Tensor]:
    spec = slots[0].spec
    if spec.dims[0].axis is Axis.PART and len(spec.dims) == 1:
        axis, sizes = 0, [1] * len(slots)
    else:
        axis = next((i for i, dim in enumerate(spec.dims) if dim.axis is Axis.OUT), 0)
        sizes = [slot.source_shape[axis] for slot in slots]
    if loaded.ndim <= axis or loaded.shape[axis] != sum(sizes):
        raise CheckpointError(
            "the tensor does not divide into the parts that this layer fuses",
            code="shape",
            file=layer or None,
            tensor=spec.name,
            expected=f"{' + '.join(map(str, sizes))} along dimension {axis}",
            found=str(list(loaded.shape)),
        )
    return list(loaded.split(sizes, dim=axis))


def wrong_dtype(slot: Slot, found: torch.dtype | None) -> CheckpointError:
    """Make the error for a tensor whose dtype its spec does not take."""
    return CheckpointError(
        "the dtype is not one that this layer's format stores",
        code="dtype",
        tensor=slot.tensor,
        expected=" or ".join(str(dtype).removeprefix("torch.") for dtype in slot.spec.dtypes),
        found=str(found).removeprefix("torch."),
    )
