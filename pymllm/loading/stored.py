"""A layer's tensors, read as the checkpoint stores them, and checked: for loading, verifying, swapping, writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pymllm.errors import CheckpointError, ConfigError
from pymllm.layers.held import HeldWeight
from pymllm.loading.match import Placement
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.loader import Slot, Written, copy_full_tensor, place, place_experts, write
from pymllm.weights.report import Skip
from pymllm.weights.spec import FLOATS, ExpertsShape, LinearShape, WeightSpec
from pymllm.weights.tensor_file import TensorInfo

PIECE = 1 << 20  # how many values are counted at a time


def read_stored(
    method: LinearMethodBase, shape: LinearShape, placements: Sequence[Placement]
) -> dict[str, Tensor]:
    """Read a layer's tensors as the checkpoint stores them, parts side by side, by the names of `weight_specs`.

    method: the one that reads them.  shape: the layer's, or one part's.  placements: at least those of its tensors.
    CheckpointError for values that cannot be right.
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
            check_values(found.tensor, spec, target, shape.part(slot.part))
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
        check_placed(p, p.slot.view(tensors[p.param]), shape)
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


def check_placed(placement: Placement, target: Tensor, shape: LinearShape | ExpertsShape | None) -> None:
    """Refuse values that cannot be right in what a tensor has filled of its parameter.

    shape: of the layer that holds it; None: it is a plain parameter.
    """
    slot, module = placement.slot, placement.module
    if placement.param in module._buffers:
        return  # a module's own, which may hold infinities, as a mask does
    several = isinstance(shape, ExpertsShape) and slot.expert is None and slot.spec.refuse is not None
    part = None if shape is None else shape.part(slot.part)
    for one in target if several else (target,):
        check_values(placement.tensor, slot.spec, one, part)


def check_values(tensor: TensorInfo, spec: WeightSpec, values: Tensor, shape: LinearShape | None) -> None:
    """Refuse values that cannot be right: of a scale, of any float, or as the spec's own `refuse` says.

    tensor: where they were read.  values: this rank's share of one part.  shape: the part's.
    """
    if spec.scale:
        check_scale(tensor, values, spec)
    elif values.dtype in FLOATS and not spec.packed:
        check_finite(tensor, values)
    if spec.refuse is not None:
        assert shape is not None
        check_content(tensor, spec.refuse(values, shape))


# What a scale must be -> whether values are, and how to say it.
SCALES: dict[bool | str, tuple[Callable[[Tensor], Tensor], str]] = {
    True: (lambda values: values > 0, "above 0"),
    "or zero": (lambda values: values >= 0, "of 0 or above"),
    "signed": (lambda values: values != 0, "other than 0"),
}
MANY_SCALES, RARE = 32, 10  # from so many scales on, fewer than one in ten of either sign are no writer's
E4M3_LARGEST = 126  # the byte of the largest e4m3 number; NaN and what is below zero have larger ones


def check_scale(tensor: TensorInfo, scale: Tensor, spec: WeightSpec) -> None:
    """Refuse a scale with values that are NaN or infinite, or of a sign that the spec's scale cannot have."""
    in_bytes = spec.scale == "or zero" and scale.dtype is torch.float8_e4m3fn and scale.numel() > 0
    if in_bytes and int(scale.view(torch.uint8).max()) <= E4M3_LARGEST:
        return  # the millions of scales of NVFP4 in one pass
    if spec.scale != "signed" and scale.dtype in FLOATS and scale.numel():
        # NaN is neither above nor below; it is both edges where any value is.
        low, high = (float(edge) for edge in torch.aminmax(scale))
        if (low >= 0 if spec.scale == "or zero" else low > 0) and high < math.inf:
            return
    values = scale.float()
    usable, expected = SCALES[spec.scale]
    bad = values.numel() - int((torch.isfinite(values) & usable(values)).sum())
    if spec.scale == "signed" and not bad and values.numel() >= MANY_SCALES:
        below = int((values < 0).sum())
        # The writer that gives scales a sign gives them that of the largest weight: either one to about half of them.
        if below and min(below, values.numel() - below) * RARE < values.numel():
            bad, expected = below, "above 0, or half of them below"
    if bad:
        raise CheckpointError(
            "a quantisation scale is not a usable number",
            code="bad-scale",
            file=str(tensor.file.path),
            tensor=tensor.name,
            expected=f"finite values {expected}",
            found=f"{bad} of {values.numel()} that are not",
            fix="The checkpoint is damaged or was written wrongly; quantise it again.",
        )


def check_finite(tensor: TensorInfo, values: Tensor) -> None:
    """Refuse floats of which some are NaN or infinite.

    One pass without a copy: least and largest are NaN where any value is, and infinite where one is.
    """
    if not values.numel() or all(bool(edge.isfinite()) for edge in torch.aminmax(values)):
        return
    bad = sum(int((~torch.isfinite(piece)).sum()) for piece in values.reshape(-1).split(PIECE))
    # Of several stored tensors that one is made of, the first that has such values.
    sources = (s for s in tensor.sources if s.dtype in FLOATS and not bool(s.read().isfinite().all()))
    tensor = next(sources, tensor)
    # A number that the file's dtype holds and a narrower one does not is infinite only here.
    converted = tensor.dtype is not values.dtype
    raise CheckpointError(
        "a parameter has values that are not finite numbers",
        code="bad-value",
        file=str(tensor.file.path),
        tensor=tensor.name,
        expected="finite values" + (f", also as {str(values.dtype)[6:]}" if converted else ""),
        found=f"{bad} of {values.numel()} that are NaN or infinite",
        fix="Load it with another dtype, if the file is whole; else download or write it again."
        if converted
        else "The checkpoint is damaged or was written wrongly: download or write it again.",
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


def check_skipped(skipped: Iterable[tuple[TensorInfo, Skip]]) -> None:
    """Prove that what is left out may be.  CheckpointError for a tensor whose content says otherwise."""
    for tensor, skip in skipped:
        why_not = None if skip.refuse is None else skip.refuse(tensor.read())
        if why_not is not None:
            raise CheckpointError(
                f"the tensor would be left out, as {skip.reason}, but it is not so",
                code="bad-content",
                file=str(tensor.file.path),
                tensor=tensor.name,
                found=why_not,
                fix="The config and the tensors contradict each other: correct the config, or write the model again.",
            )
