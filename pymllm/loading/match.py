"""`match`: every checkpoint tensor gets its place, by name or as a module's own resolver says, from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from torch import nn

from pymllm.errors import nearest
from pymllm.layers.held import PlainParameters, WeightHolder, weight_holders, whole_slot
from pymllm.models.language_model import LanguageModel
from pymllm.quantization.rules import RuledConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.loader import Slot
from pymllm.weights.report import HINTS, Problem, Skip, TensorRecord, mismatch, missing, raise_problems
from pymllm.weights.resolution import ResolvedWeight, defines_resolver, resolve_weight_spec
from pymllm.weights.tensor_file import TensorInfo


@dataclass(frozen=True)
class Placement:
    """One checkpoint tensor, and the parameter (or buffer) `param` of `module` that it fills a part of: `slot`.

    resolved: what a module's own resolver says of the tensor; None: it is the slot's by name.
    """

    module: nn.Module
    param: str
    slot: Slot
    tensor: TensorInfo
    resolved: ResolvedWeight | None = None


@dataclass(frozen=True)
class Unit:
    """A holder of weights and all that it is loaded from: they are read and packed together.

    name: the holder's, in the model.
    """

    name: str
    holder: WeightHolder
    placements: tuple[Placement, ...]


Skipped = tuple[tuple[TensorInfo, Skip], ...]


def match(
    model: LanguageModel, rules: RuledConfig, checkpoint: Checkpoint, proven: Mapping[str, str] | None = None
) -> tuple[tuple[Unit, ...], tuple[TensorRecord, ...], Skipped]:
    """Find every parameter's tensors, and account for every tensor.

    proven: tensors that have been found to be harmless already, and why, by name.
    Returns the units to load, records of the tensors that are skipped, and those of them whose content has to be
    looked at while loading.  ONE CheckpointError lists all that is wrong.
    """
    stored_as = checkpoint.stored_as.tensor
    problems: list[Problem] = []
    units: list[Unit] = []
    used: set[str] = set()
    resolved = _Resolved(model, checkpoint) if defines_resolver(model) else None
    holders = [(name, holder) for name, holder in weight_holders(model) if holder.loads]
    known = {
        spelling: place.slot.names
        for name, holder in holders
        for place in holder.places(name)
        for spelling in place.slot.names
    }
    elsewhere = [slot for _, holder in holders for slot in holder.slots_elsewhere()]
    known |= {name: slot.names for slot in elsewhere for name in slot.names}
    stray = [name for name in checkpoint.tensors if name not in known]
    extra = [] if resolved is None else resolved.holders_of_buffers({name for name, _ in holders})
    for name, holder in (*holders, *extra):
        placements = [] if resolved is None else resolved.placements(name, holder, problems)
        taken = {(id(p.module), p.param, p.slot.part, p.slot.names) for p in placements}
        for place in holder.places(name):
            slot = place.slot
            if (id(place.module), place.param, slot.part, slot.names) in taken:
                continue
            names = slot.names if resolved is None else [n for n in slot.names if n not in resolved.places]
            tensor = next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)
            if tensor is None:
                if not (slot.together and slot.part):
                    problems.append(
                        missing(slot, [stored_as(n) for n in stray] if len(problems) < HINTS else ())
                    )
                continue
            used.add(tensor.name)
            problem = mismatch(slot, tensor)
            if (
                problem is not None and problem not in problems
            ):  # else said already: a tensor may hold several parts
                problems.append(problem)
            placements.append(Placement(place.module, place.param, slot, tensor))
        units.append(Unit(name, holder, tuple(placements)))
    records = []
    for slot in elsewhere:
        tensor = next((checkpoint.tensors[n] for n in slot.names if n in checkpoint.tensors), None)
        wrong = missing(slot, stray) if tensor is None else mismatch(slot, tensor)
        if wrong is not None:
            problems.append(wrong)
        if tensor is not None:
            used.add(tensor.name)
            records.append(TensorRecord(tensor.name, "skipped", 0, "another rank holds this expert"))
    if resolved is not None:
        used |= resolved.used
        problems += resolved.without_place()
        records += [TensorRecord(n, "skipped", 0, "the model's resolver skips it") for n in resolved.skipped]
    skipped: list[tuple[TensorInfo, Skip]] = []
    why_not_run = model.find_not_run(checkpoint.tensors)
    for tensor_name, tensor in checkpoint.tensors.items():
        if tensor_name in used:
            continue
        reason = None if tensor_name in known else why_not_run(tensor_name)
        skip = None if reason is None else Skip(reason, kept=True)
        skip = skip or _skip(tensor_name, model, rules, proven or {}, checkpoint.tensors)
        if skip is None:
            hint = nearest(stored_as(tensor_name), map(stored_as, known)) if len(problems) < HINTS else ""
            text = f"unexpected, no layer asks for it. {hint}".strip()
            if tensor_name in known:
                twin = next((name for name in known[tensor_name] if name in used), None)
                text = "unexpected, a module's resolver fills its place from another tensor"
                if twin is not None:
                    text = f"unexpected, {stored_as(twin)} fills its place, which has both names"
            problems.append(Problem("unexpected", tensor_name, text))
        else:
            records.append(TensorRecord(tensor_name, "skipped", 0, skip.reason))
            skipped.append((tensor, skip))
    absent = checkpoint.stored_as.absent
    spelled = (
        replace(p, tensor=absent(p.tensor) if p.code == "missing" else stored_as(p.tensor)) for p in problems
    )
    raise_problems(str(checkpoint.path), spelled)
    return tuple(units), tuple(records), tuple(skipped)


class _Resolved:
    """The answers of the modules' own resolvers on the checkpoint's tensors.

    places: by tensor name.  skipped: the tensors that a resolver skips.  used: these, and those that found their place.
    """

    def __init__(self, model: LanguageModel, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        said = {name: resolve_weight_spec(model, name, model.config) for name in checkpoint.tensors}
        self.places = {name: place for name, place in said.items() if place is not None}
        self.skipped = [name for name, place in self.places.items() if place.skip]
        self.used = set(self.skipped)

    def holders_of_buffers(self, known: Set[str]) -> list[tuple[str, WeightHolder]]:
        """Find the modules beside those known by name that have a buffer which a tensor goes to."""
        wanted = {id(place.buffer) for place in self.places.values() if place.buffer is not None}
        return [
            (name, PlainParameters(module))
            for name, module in self.model.named_modules()
            if name not in known and any(id(buffer) in wanted for buffer in module._buffers.values())
        ]

    def placements(self, unit: str, holder: WeightHolder, problems: list[Problem]) -> list[Placement]:
        """Find the placements of one unit.

        unit: its name.  problems: gets one for a place that two tensors want, or that one does not fit.
        """
        found: list[Placement] = []
        module, places = holder.module, list(holder.places(unit))
        for name, said in self.places.items():
            tensor = self.checkpoint.tensors[name]
            for buffer_name, buffer in module._buffers.items():
                if buffer is not None and buffer is said.buffer:
                    slot = whole_slot(unit, buffer_name, buffer)
                    found.append(Placement(module, buffer_name, slot, tensor, said))
                    self.used.add(name)
            for place in places:
                param, slot = place.param, place.slot
                if said.param is None or place.module._parameters[param] is not said.param:
                    continue
                part = None if said.shard_id is None else _part_index(place.module, said.shard_id)
                if part not in (None, slot.part):
                    continue
                if any((other.param, other.slot) == (param, slot) for other in found):
                    text = "a second tensor for a place that another one fills"
                    problems.append(Problem("written-twice", name, text))
                simple = said.transform is None and said.loader is None
                if simple and (part is not None or sum(p.param == param for p in places) == 1):
                    problem = mismatch(slot, tensor)
                    problems += [] if problem is None else [problem]
                found.append(Placement(place.module, param, slot, tensor, said))
                self.used.add(name)
        return found

    def without_place(self) -> list[Problem]:
        """List a problem for every tensor whose resolver names nothing that this model has."""
        lost = [name for name in self.places if name not in self.used]
        self.used.update(lost)
        text = "its resolver names no parameter (also of a loader of its own) or buffer of this model"
        return [Problem("resolved-weight", name, text) for name in lost]


def _part_index(module: nn.Module, shard_id: int | str) -> int | None:
    """Return which part of a module's parameters a resolver means; 0 where the module knows no parts."""
    find = getattr(module, "part_index", None)
    return 0 if find is None else find(shard_id)


def _skip(
    name: str,
    model: LanguageModel,
    rules: RuledConfig,
    proven: Mapping[str, str],
    stored: Mapping[str, TensorInfo],
) -> Skip | None:
    """Return why a tensor that no layer asks for may be skipped, and the proof; None: it may not."""
    if name in proven:
        return Skip(proven[name])
    for pattern, reason in model.skipped_tensors.items():
        if re.fullmatch(pattern, name):
            return Skip(reason)
    said = model.skip_reason(name, stored) or rules.skip_reason(name)
    return Skip(said) if isinstance(said, str) else said
