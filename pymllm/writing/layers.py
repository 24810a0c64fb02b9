"""The content of a checkpoint that is to be written: layers under their names, and tensors that stay as they are.

Layers come from a `Prepared` model, so that names, rules and checks are those of loading; parts of fused layers stand
alone. Steps group them by the block of the model that they belong to: a step is read, written and kept at a time.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pymllm.errors import CheckpointError, ConfigError
from pymllm.kernels.canonical import CanonicalWeight, IntWeight
from pymllm.loading.match import Placement, Unit
from pymllm.loading.prepare import Prepared
from pymllm.loading.stored import check_finite, read_stored
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.calibrated import without_static
from pymllm.quantization.rules import Rule
from pymllm.weights.spec import FLOATS, LinearShape
from pymllm.weights.tensor_file import TensorInfo
from pymllm.writing.stacked_experts import Cut, can_cut, cuts_of, expert_biases

NOT_RUN = "what is not run"  # the name of the step that copies it


@dataclass(frozen=True)
class SourceLayer:
    """One layer under its checkpoint name.

    kind: linear, embedding or lm_head.  shape: under that name.  stored: the shape under the name that its tensors
    have, which is the embedding's for a tied head.  source: the method that reads it.  target: the method that a rule
    gives it, or None: it keeps its weight.  rule: the user's rule that decided, or None.  placements: of its stored
    tensors.  cut: its piece of them, where they hold all experts.
    """

    name: str
    kind: str
    shape: LinearShape
    stored: LinearShape
    source: LinearMethodBase
    target: LinearMethodBase | None
    rule: Rule | None
    placements: tuple[Placement, ...] = field(repr=False)
    cut: Cut | None = None

    def read(self) -> CanonicalWeight:
        """Read the stored weight.  CheckpointError for unusable scales, or contents that contradict the layer."""
        read = read_stored if self.cut is None else self.cut.read
        return self.source.to_canonical(read(self.source, self.stored, self.placements), self.stored)

    def decode(self, weight: CanonicalWeight) -> Tensor:
        """Decode a stored weight to [O, I] float32.  CheckpointError if a value is not finite."""
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

    def planned_integers(self) -> IntWeight | None:
        """Plan, without data, the integer codes that the rule makes, which input scales and Hessians can improve.

        Returns None where the rule makes anything else, or float zero points, or scales that depend on each other.
        """
        if self.target is None or not self.target.free_scales:
            return None
        meta = torch.empty((self.shape.out_features, self.shape.in_features), device="meta")
        made = without_static(self.target).quantize(meta, self.shape)
        return made if isinstance(made, IntWeight) and made.offsets is None else None

    @property
    def nbytes(self) -> int:
        total = sum(placement.tensor.nbytes for placement in self.placements)
        return total if self.cut is None else total // self.cut.pieces


@dataclass(frozen=True)
class Step:
    """A block of the model: its layers, and the tensors (norms, biases) that are copied.

    block: its number, or None for a module outside of the blocks.  units: what loading would read and pack together.
    """

    name: str
    block: int | None
    units: tuple[Unit, ...]
    layers: tuple[SourceLayer, ...]
    copied: tuple[TensorInfo, ...]

    def read_copied(self) -> dict[str, Tensor]:
        """Read the tensors that are copied, by name.  CheckpointError for floats that are not finite."""
        tensors = {info.name: info.read() for info in self.copied}
        for info in self.copied:
            if info.dtype in FLOATS:
                check_finite(info, tensors[info.name])
        return tensors

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers) + sum(tensor.nbytes for tensor in self.copied)


def steps_of(prepared: Prepared, cuts_experts: bool = False) -> list[Step]:
    """Divide the model into its blocks in order, each with its layers and its other tensors.

    cuts_experts: whether a weight that is stored for all experts in one becomes a layer for each.
    ConfigError for layers that cannot be written: see `_refuse_resolved` and `_source_layers`.
    """
    _refuse_resolved(prepared)
    by_step: dict[str, list[Unit]] = {}
    for unit in prepared.units:
        block = prepared.model.block_of(unit.name)
        by_step.setdefault(unit.name if block is None else block, []).append(unit)
    steps = []
    used: set[str] = set()  # by steps before, too: a tied head reads the embedding's tensor
    converted = {
        s.name
        for u in prepared.units
        if list(u.holder.parts())
        for p in u.placements
        for s in p.tensor.sources
    }
    for name, units in by_step.items():
        layers: list[SourceLayer] = []
        copied: dict[str, TensorInfo] = {}
        for unit in units:
            found = list(_source_layers(unit, prepared, cuts_experts))
            layers += found
            used |= {placement.tensor.name for layer in found for placement in layer.placements}
            for part in unit.holder.parts() if cuts_experts else ():
                for bias in expert_biases(part, unit) if part.stacked else ():
                    copied[bias.name] = bias
                    used.add(bias.stacked.name)
            for p in unit.placements:
                if p.tensor.name not in used:
                    copied |= {info.name: info for info in _as_stored(p.tensor, converted)}
        number = None if prepared.model.block_of(name) is None else int(name.rpartition(".")[2])
        steps.append(Step(name, number, tuple(units), tuple(layers), tuple(copied.values())))
    kept = kept_parts(prepared)
    return steps if not kept else [*steps, Step(NOT_RUN, None, (), (), kept)]


def kept_parts(prepared: Prepared) -> tuple[TensorInfo, ...]:
    """List the tensors of parts that are not run, which are copied as they are.

    Those of quantised layers are not among them: the config that is written does not say how to read them.
    """
    kept = [tensor for tensor, skip in prepared.skipped if skip.kept]
    quantised = {tensor.name.rpartition(".")[0] for tensor in kept if tensor.dtype not in FLOATS}
    if prepared.quant.checkpoint_config.get_name() == "none":
        quantised = set()
    return tuple(tensor for tensor in kept if tensor.name.rpartition(".")[0] not in quantised)


def _as_stored(tensor: TensorInfo, converted: Set[str]) -> tuple[TensorInfo, ...]:
    """Return the stored tensors that one is made of, or itself where layers that are written hold parts of these.

    converted: the stored tensors that layers are made of, by name.
    """
    sources = tensor.sources
    return (tensor,) if any(source.name in converted for source in sources) else sources or (tensor,)


def _refuse_resolved(prepared: Prepared) -> None:
    """Refuse tensors that a model's own resolver changes while they load: they are not what would be written."""
    for unit in prepared.units:
        for placement in unit.placements:
            if placement.resolved is not None:
                raise ConfigError(
                    "the model's own resolver places this tensor, and a written checkpoint cannot say how",
                    code="spelling",
                    tensor=placement.tensor.name,
                    fix="Load the model with rules instead (--quant), which quantises while it loads.",
                )


def _source_layers(unit: Unit, prepared: Prepared, cuts_experts: bool) -> Iterator[SourceLayer]:
    """Yield the weights that a unit holds, each under its own name.  A head that shares its embedding's table has none.

    Floats of all experts in one tensor are no layer, unless they are to be cut: they are copied as they are.
    ConfigError where such a tensor would have to be quantised, or written in another format.
    """
    if unit.holder.borrows_from is not None:
        return
    for part in unit.holder.parts():
        source = part.method.source_method()
        target = part.method.target if isinstance(part.method, ConvertedLinearMethod) else None
        rule = prepared.quant.decisions[part.name].rule
        if part.stacked and cuts_experts and can_cut(part, source):
            whole = tuple(
                p for p in unit.placements if p.module is part.module and p.slot.prefix == part.stored
            )
            for piece, cut in cuts_of(part):
                yield SourceLayer(piece.name, "linear", piece, piece, source, target, rule, whole, cut)
            continue
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
        shape, stored = (replace(part.shape, parts=(name,)) for name in (part.name, part.stored))
        wanted = {spec.name for spec in source.weight_specs(stored)}
        own = tuple(
            p
            for p in unit.placements
            if p.module is part.module and p.slot.prefix == part.stored and p.slot.spec.name in wanted
        )
        kind = "linear" if part.kind == "experts" else part.kind
        yield SourceLayer(part.name, kind, shape, stored, source, target, rule, own)
