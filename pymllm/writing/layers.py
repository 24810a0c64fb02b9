"""What a checkpoint is made of when it is written: its layers under their names, and the tensors that stay as they are.

Layers come from a `Prepared` model, so that names, rules and checks are those of loading; parts of fused layers stand
alone. Steps group them by the block of the model that they belong to: what is read, written and kept at a time.
"""

# O out_features, I in_features

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pymllm.errors import CheckpointError, ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.loading.match import Placement, Unit
from pymllm.loading.prepare import Prepared
from pymllm.loading.stored import read_stored
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import Rule
from pymllm.weights.spec import LinearShape
from pymllm.weights.tensor_file import TensorInfo

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class SourceLayer:
    """One layer under its checkpoint name.

    kind: linear, embedding or lm_head.  source: the method that reads it.  target: what a rule makes of it, or None.
    """

    name: str
    kind: str
    shape: LinearShape
    source: LinearMethodBase
    target: LinearMethodBase | None
    rule: Rule | None
    placements: tuple[Placement, ...] = field(repr=False)

    def read(self) -> CanonicalWeight:
        """The stored weight.  CheckpointError for unusable scales, or values that are not finite."""
        return self.source.to_canonical(read_stored(self.source, self.shape, self.placements), self.shape)

    def decode(self, weight: CanonicalWeight) -> Tensor:
        """[O, I] float32.  CheckpointError if a value is not finite."""
        floats = weight.dequantize(torch.float32)
        bad = floats.numel() - int(torch.isfinite(floats).sum())
        if bad:
            raise CheckpointError(
                "the weight has values that are not finite numbers",
                code="bad-weight",
                file=str(self.placements[0].tensor.file.path),
                tensor=self.name,
                expected="finite values",
                found=f"{bad} of {floats.numel()} that are NaN or infinite",
                fix="The checkpoint is damaged; it cannot be quantised.",
            )
        return floats

    @property
    def nbytes(self) -> int:
        return sum(placement.tensor.nbytes for placement in self.placements)


@dataclass(frozen=True)
class Step:
    """A block of the model: its layers, and the tensors (norms, biases) that are copied.

    block: its number, or None for what stands outside of the blocks.
    """

    name: str
    block: int | None
    layers: tuple[SourceLayer, ...]
    copied: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + sum(tensor.nbytes for tensor in self.copied)


def steps_of(prepared: Prepared) -> list[Step]:
    """The model's blocks in order, each with its layers and its other tensors."""
    layers: dict[str, list[SourceLayer]] = {}
    copied: dict[str, dict[str, TensorInfo]] = {}
    used: set[str] = set()
    _refuse_resolved(prepared)
    for unit in prepared.units:
        step = _step_name(unit.name)
        layers.setdefault(step, [])
        copied.setdefault(step, {})
        found = list(_source_layers(unit, prepared))
        layers[step] += found
        used |= {placement.tensor.name for layer in found for placement in layer.placements}
        for placement in unit.placements:
            if placement.tensor.name not in used:
                copied[step][placement.tensor.name] = placement.tensor
    return [
        Step(name, int(name.rpartition(".")[2]) if BLOCK.search(name) else None, tuple(of), tuple(rest))
        for name, of in layers.items()
        for rest in (copied[name].values(),)
    ]


def _refuse_resolved(prepared: Prepared) -> None:
    """Tensors that a model's own resolver changes while they load are not what is stored, and cannot be written so."""
    for unit in prepared.units:
        for placement in unit.placements:
            if placement.resolved is not None:
                raise ConfigError(
                    "the model resolves its weights in its own way, which files cannot say",
                    code="spelling",
                    tensor=placement.tensor.name,
                    fix="Load the model with rules instead: --quant.",
                )


def _step_name(unit: str) -> str:
    """model.layers.3 for all of its units; a name of its own for any other."""
    block = BLOCK.search(unit)
    return unit[: block.end(1)] if block else unit


def _source_layers(unit: Unit, prepared: Prepared) -> Iterator[SourceLayer]:
    """Yield the weights that a unit holds, each under its own name.  A head that shares its embedding's table has none.

    Floats of all experts in one tensor are no layer: they are copied as they are.
    ConfigError where such a tensor would have to be quantised, or written in another format.
    """
    if unit.holder.shares_with is not None:
        return
    for part in unit.holder.parts():
        source = part.method.source_method()
        target = part.method.target if isinstance(part.method, ConvertedLinearMethod) else None
        if part.stacked:
            if target is None and isinstance(source, UnquantizedLinearMethod):
                continue
            raise ConfigError(
                "all experts lie in one tensor, which no spelling has a quantised form of",
                code="spelling",
                tensor=part.name,
                expected="experts with tensors of their own, as experts.0.up_proj",
                found=f"{source.describe()}, to be {target.describe() if target else 'kept'}",
                fix=f"Leave it as it is ({part.name}=none is for floats), or load it with rules instead.",
            )
        shape = replace(part.shape, parts=(part.stored,))
        wanted = {spec.name for spec in source.weight_specs(shape)}
        own = tuple(
            p
            for p in unit.placements
            if p.module is part.module and p.slot.prefix == part.stored and p.slot.spec.name in wanted
        )
        kind = "linear" if part.kind == "experts" else part.kind
        rule = prepared.quant.decisions[part.name].rule
        yield SourceLayer(part.name, kind, shape, source, target, rule, own)
