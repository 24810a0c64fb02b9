"""A layer's tensors, read as the checkpoint stores them, and checked: for loading, verifying, swapping, writing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymllm.errors import CheckpointError, ConfigError
from pymllm.layers.held import HeldWeight
from pymllm.loading.match import Placement
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, Written, copy_full_tensor, place, place_experts, write
from pymllm.weights.spec import LinearShape
from pymllm.weights.tensor_file import TensorInfo


def read_stored(
    method: LinearMethodBase, shape: LinearShape, placements: Sequence[Placement]
) -> dict[str, Tensor]:
    """Read a layer's tensors as the checkpoint stores them, parts side by side, by the names of `weight_specs`.

    method: the one that reads them.  shape: the layer's, or one part's.  placements: at least those of its tensors.
    CheckpointError for scales and contents that cannot be right.
    """
    tensors: dict[str, Tensor] = {}
    for spec in method.weight_specs(shape):
        local, slots = place(spec, shape)
        tensor = torch.zeros(local, dtype=spec.dtype)
        written = Written()
        whole: set[str] = set()
        for slot in slots:
            found = next(
                p
                for p in placements
                if p.slot.names == slot.names and (len(slots) == 1 or p.slot.part == slot.part)
            )
            scalar = len(found.tensor.shape) != len(slot.source)
            if found.resolved is None:
                write(tensor, slot, found.tensor.read(None if scalar else slot.source), written)
            elif found.tensor.name not in whole:
                whole.add(found.tensor.name)
                loaded = _read_transformed(found)
                part = None if found.resolved.shard_id is None else slot.part
                copy_full_tensor(tensor, slots, loaded, written, part, shape.name)
            target = tensor[slot.target] if slot.target else tensor
            if spec.scale:
                check_scale(found.tensor, target)
            if spec.refuse is not None:
                check_content(found.tensor, spec.refuse(target, shape.part(slot.part)))
        tensors[spec.name] = tensor
    return tensors


def read_held(weight: HeldWeight, placements: Sequence[Placement]) -> dict[str, Tensor]:
    """Read a held weight's tensors as the checkpoint stores them; of all experts, [E, ...] each.

    placements: those of the module that the tensors are stored in.
    """
    shape, method = weight.shape, weight.method
    if isinstance(shape, LinearShape):
        return read_stored(method, shape, placements)
    tensors: dict[str, Tensor] = {}
    written: dict[str, Written] = {}
    for spec in method.weight_specs(shape.one):
        tensors[spec.name] = torch.zeros(place_experts(spec, shape)[0], dtype=spec.dtype)
        written[spec.name] = Written()
    for p in placements:
        write(tensors[p.param], p.slot, read_slot(p.tensor, p.slot), written[p.param])
    return tensors


def _read_transformed(placement: Placement) -> Tensor:
    """Read the full tensor of a resolved placement.  ConfigError if a loader of the module's own takes it."""
    assert placement.resolved is not None
    if placement.resolved.loader is not None:
        raise ConfigError(
            "a loader of the module's own takes this tensor, so what it means cannot be read again",
            code="resolved-weight",
            tensor=placement.tensor.name,
        )
    loaded = placement.tensor.read()
    return loaded if placement.resolved.transform is None else placement.resolved.transform(loaded)


def read_slot(tensor: TensorInfo, slot: Slot) -> Tensor:
    """Read this rank's slice of a tensor, which may be stored with more dimensions of one element."""
    return tensor.read((*slot.source, *(slice(0, 1) for _ in tensor.shape))[: len(tensor.shape)])


def check_scale(tensor: TensorInfo, scale: Tensor) -> None:
    """Refuse a scale with values that are zero, infinite or NaN.  tensor: where it was read."""
    values = scale.float()
    bad = int((~torch.isfinite(values)).sum()) + int((values == 0).sum())
    if bad:
        raise CheckpointError(
            "a quantisation scale is not a usable number",
            code="bad-scale",
            file=str(tensor.file.path),
            tensor=tensor.name,
            expected="finite values other than zero",
            found=f"{bad} of {values.numel()} that are NaN, infinite or zero",
            fix="The checkpoint is damaged or was written wrongly; quantise it again.",
        )


def check_content(tensor: TensorInfo, why_not: str | None) -> None:
    """Refuse a tensor for which a method has found a reason; None: there is none."""
    if why_not is not None:
        raise CheckpointError(
            "the tensor contradicts its layer or the checkpoint's config",
            code="bad-content",
            file=str(tensor.file.path),
            tensor=tensor.name,
            found=why_not,
        )
