"""AWQ's input scales: where they can be folded exactly, how they are searched, and what they change.

Inputs that matter are made larger in the weights before these are rounded, and smaller where the inputs are made: in a
norm that only these layers read, or in the outputs of the layer whose product they are (up, before down).
"""

# I in_features

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm.models.causal_lm import DecoderLayer
from pymllm.quantization.rounding.awq import search_scales
from pymllm.quantization.rounding.calibrated import without_static
from pymllm.writing.encoding import encode
from pymllm.writing.float_model import FloatStep
from pymllm.writing.layers import SourceLayer


@dataclass(frozen=True)
class ScaleGroup:
    """Layers that share an input which scales can be divided out of.

    names: of the layers.  reader: the module that they are.  run: the module whose output is to be kept.
    norm: the tensor of the norm that makes the input; or layer: the layer whose outputs are multiplied into it.
    """

    names: tuple[str, ...]
    reader: str
    run: str
    norm: str | None = None
    layer: str | None = None


def fold_input_scales(
    step: FloatStep, layers: Mapping[str, SourceLayer], scale_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Search the input scales of a step's layers and fold them into what makes their inputs.

    layers: the step's, by name.  scale_dtype: of the weights' own scales.
    Returns the copied tensors of the checkpoint that this changed.
    """
    changed: dict[str, Tensor] = {}
    for group in scale_groups(step, layers):
        scales = search_group(step, group, layers, scale_dtype)
        if scales is not None:
            changed |= fold(step, group, scales)
    return changed


def scale_groups(step: FloatStep, layers: Mapping[str, SourceLayer]) -> list[ScaleGroup]:
    """Find where scales can be folded exactly: behind a norm that only these layers read, and between up and down."""
    groups: list[ScaleGroup] = []
    if not isinstance(step.module, DecoderLayer):
        return groups
    for block_name, block in step.module.named_children():
        path = f"{step.step.name}.{block_name}"
        norm = step.module.read_by.get(block_name)
        if norm is not None:
            for reader in getattr(block, "reads_input", ()):
                names = getattr(block, reader).shape.parts
                norm_weight = f"{step.step.name}.{norm}.weight"
                groups.append(ScaleGroup(names, f"{path}.{reader}", path, norm=norm_weight))
        for reader, (maker, part) in getattr(block, "factors", {}).items():
            makers, names = getattr(block, maker).shape.parts, getattr(block, reader).shape.parts
            if part < len(makers):  # else its rows have no name of their own
                reader_path = f"{path}.{reader}"
                groups.append(ScaleGroup(names, reader_path, reader_path, layer=makers[part]))
    return [group for group in groups if _foldable(step, group, layers)]


def _foldable(step: FloatStep, group: ScaleGroup, layers: Mapping[str, SourceLayer]) -> bool:
    """Return whether all that would change is to be quantised anyway, or is a norm."""
    changed = [*group.names, *([group.layer] if group.layer else [])]
    if not all(name in layers and layers[name].target is not None for name in changed):
        return False
    if not all(layers[name].planned_integers() is not None for name in group.names):
        return False
    return group.norm is None or (
        group.norm in step.params and hasattr(_norm(step, group.norm), "weight_offset")
    )


def _norm(step: FloatStep, weight: str) -> Any:
    """Return the norm that has this weight."""
    return step.model.modules[weight.removesuffix(".weight")]


def search_group(
    step: FloatStep, group: ScaleGroup, layers: Mapping[str, SourceLayer], scale_dtype: torch.dtype | None
) -> Tensor | None:
    """Search the scales [I] with which rounding changes the output of `group.run` least; None without inputs."""

    def rounding(layer: SourceLayer) -> Callable[[Tensor], Tensor]:
        assert layer.target is not None
        target = without_static(layer.target)
        return lambda weight: encode(target, weight, layer.shape, scale_dtype).dequantize(torch.float32)

    inputs = step.inputs_of(group.reader)
    if inputs is None:
        return None
    weights = [step.weights[name] for name in group.names]
    rounded = [rounding(layers[name]) for name in group.names]
    planned = [layers[name].planned_integers() for name in group.names]
    group_size = min(weight.group_size for weight in planned if weight is not None)
    return search_scales(weights, inputs, step.runner_of(group.run), rounded, group_size)


def fold(step: FloatStep, group: ScaleGroup, scales: Tensor) -> dict[str, Tensor]:
    """Divide the input by `scales` [I] where it is made, and multiply the layers' weights.

    A norm is rounded to the dtype that it is stored in, and the layers get what it really was divided by.
    Returns the changed tensors of the checkpoint.
    """
    copied = {tensor.name: tensor for tensor in step.step.copied}
    changed = {}
    if group.norm is not None:
        norm, dtype = step.params[group.norm], copied[group.norm].dtype
        added = _norm(step, group.norm).weight_offset
        stored = (norm / scales - added).to(dtype)
        divided = stored.float() + added
        usable = (divided != 0) & torch.isfinite(divided) & (norm != 0)
        scales = torch.where(usable, norm / divided, 1.0)
        stored = torch.where(usable, stored, (norm - added).to(dtype))
        norm.copy_(stored.float() + added)
        changed[group.norm] = stored
    else:
        assert group.layer is not None
        step.weights[group.layer].div_(scales.unsqueeze(1))
        name = f"{group.layer}.bias"
        bias = step.params.get(name)
        if bias is not None:
            changed[name] = (bias / scales).to(copied[name].dtype)
            bias.copy_(changed[name])
    for name in group.names:
        step.weights[name].mul_(scales)
    return changed
