"""Weights and biases of single experts, cut from tensors that hold all experts of a layer.

GGUF files have gate, up and down apart. A checkpoint such as gpt-oss has gate and up as one tensor [E, 2·I, ...], their
outputs in turns or one after the other; rules name that tensor, and the experts that are cut from it have its rule.
"""

# E experts, H hidden size, I intermediate size of one expert

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pymllm.layers.held import HeldPart
from pymllm.loading.match import Placement, Unit
from pymllm.loading.stored import check_values
from pymllm.moe.experts import SPELLINGS, STACKED
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import place
from pymllm.weights.spec import Axis, ExpertsShape, LinearShape, Span, WeightSpec
from pymllm.weights.tensor_file import TensorInfo

GATE, UP, DOWN = SPELLINGS[0]
NAMES = {
    STACKED[0]: (GATE, UP),
    STACKED[1]: (DOWN,),
}  # of a tensor of all experts: what each expert has of it


@dataclass(frozen=True)
class Cut:
    """A piece of a tensor of all experts: expert `expert`, and of its outputs the `part`-th of `parts`, in order.

    shape: of the tensor's product.
    """

    shape: ExpertsShape
    expert: int
    part: int
    parts: int

    @property
    def pieces(self) -> int:
        """Return how many pieces the tensor has."""
        return self.shape.total * self.parts

    def read(
        self, method: LinearMethodBase, shape: LinearShape, placements: Sequence[Placement]
    ) -> dict[str, Tensor]:
        """Read the expert's own tensors, by the names of `weight_specs`, as `read_stored` reads those of a layer.

        shape: of the piece.  placements: of the tensors of all experts.
        """
        tensors = {}
        for spec in method.weight_specs(shape):
            tensor = next(p.tensor for p in placements if p.slot.spec.name == spec.name)
            # A scale may be stored with more dimensions of one element.
            piece = self.of(spec, tensor).to(spec.dtype).reshape(place(spec, shape)[0])
            tensors[spec.name] = piece
            check_values(tensor, spec, piece, shape)
        return tensors

    def of(self, spec: WeightSpec, tensor: TensorInfo) -> Tensor:
        """Read the piece.  spec: of one expert's tensor.  A tensor without outputs belongs to every part."""
        whole = (slice(0, size) for size in tensor.shape[1:])
        mine = self.shape.in_order(spec, tensor.read((slice(self.expert, self.expert + 1), *whole))[0])
        axis = _outputs_of(spec)
        return mine if axis is None else mine.chunk(self.parts, axis)[self.part].contiguous()

    def shape_of(self, spec: WeightSpec, tensor: TensorInfo) -> tuple[int, ...]:
        """Return the piece's shape, as `of` gives it."""
        shape, axis = list(tensor.shape[1:]), _outputs_of(spec)
        if axis is not None:
            shape[axis] //= self.parts
        return tuple(shape)


@dataclass(frozen=True)
class ExpertBias(TensorInfo):
    """The bias of one product of one expert, [O]; its place in the file is that of all."""

    cut: Cut
    spec: WeightSpec
    stacked: TensorInfo

    def read(self, index: tuple[slice, ...] | None = None, out: Tensor | None = None) -> Tensor:
        found = self.cut.of(self.spec, self.stacked)[index if index is not None else ...]
        return found if out is None else out.copy_(found)

    @property
    def nbytes(self) -> int:
        return self.stacked.nbytes // self.cut.pieces


def can_cut(part: HeldPart, source: LinearMethodBase) -> bool:
    """Tell whether a stacked weight can be cut: its outputs are not in groups, and the experts have its usual name."""
    dims = [dim for spec in source.weight_specs(part.shape) for dim in spec.dims if dim.axis is Axis.OUT]
    return part.name.rpartition(".")[2] in NAMES and all(dim == replace(dim, granule=1) for dim in dims)


def cuts_of(part: HeldPart) -> Iterator[tuple[LinearShape, Cut]]:
    """Yield every piece of a stacked weight: its shape under its own name, as experts.3.up_proj, and its cut."""
    prefix, _, last = part.name.rpartition(".")
    shape: Any = part.module.shape
    outputs = (Span.full(part.shape.out_features // len(NAMES[last])),)
    for expert in range(shape.total):
        for index, name in enumerate(NAMES[last]):
            own = replace(part.shape, outputs=outputs, parts=(f"{prefix}.{expert}.{name}",))
            yield own, Cut(shape, expert, index, len(NAMES[last]))


def expert_biases(part: HeldPart, unit: Unit) -> Iterator[ExpertBias]:
    """Yield the biases of the layers of a stacked weight, where it has some."""
    for placement in unit.placements:
        if placement.slot.prefix != part.stored or placement.slot.spec.name != "bias":
            continue
        one = replace(placement.slot.spec, dims=placement.slot.spec.dims[1:])
        for own, cut in cuts_of(part):
            fields = {
                **vars(placement.tensor),
                "name": f"{own.name}.bias",
                "shape": cut.shape_of(one, placement.tensor),
            }
            yield ExpertBias(**fields, cut=cut, spec=one, stacked=placement.tensor)


def _outputs_of(spec: WeightSpec) -> int | None:
    """Return the axis of a tensor's outputs, or None."""
    return next((index for index, dim in enumerate(spec.dims) if dim.axis is Axis.OUT), None)
