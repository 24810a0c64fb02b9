"""Every checkpoint tensor and its place: by name, or as a module's own resolver says; from headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pymllm.attention import Attention
from pymllm.errors import nearest
from pymllm.layers.linear import WeightedLayer
from pymllm.models.causal_lm import CausalLM
from pymllm.moe.experts import Experts
from pymllm.moe.layer import FusedMoE
from pymllm.quantization.rules import RuledConfig
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.loader import Slot, place
from pymllm.weights.report import HINTS, Problem, TensorRecord, mismatch, missing, raise_problems
from pymllm.weights.resolution import ResolvedWeight, defines_resolver, resolve_weight_spec
from pymllm.weights.spec import FLOATS, LinearShape, Span, WeightSpec, whole
from pymllm.weights.tensor_file import TensorInfo


@dataclass(frozen=True)
class Placement:
    """One checkpoint tensor and the parameter that it fills a part of.

    resolved: what a module's own resolver says of it; None: the tensor is the slot's by name.
    """

    module: nn.Module
    param: str
    slot: Slot
    tensor: TensorInfo
    resolved: ResolvedWeight | None = None


@dataclass(frozen=True)
class Unit:
    """What is loaded and packed together: a layer with a quant_method, or a module with plain parameters."""

    name: str
    module: nn.Module
    placements: tuple[Placement, ...]


def match(
    model: CausalLM, rules: RuledConfig, checkpoint: Checkpoint
) -> tuple[tuple[Unit, ...], tuple[TensorRecord, ...]]:
    """Find every parameter's tensors, and account for every tensor.  ONE CheckpointError lists all that is wrong."""
    problems: list[Problem] = []
    units: list[Unit] = []
    used: set[str] = set()
    resolved = _Resolved(model, checkpoint) if defines_resolver(model) else None
    known = {
        name: None
        for unit, module in _units(model)
        for _, _, slot in _slots(unit, module)
        for name in slot.names
    }
    elsewhere = list(_slots_elsewhere(model))
    known |= dict.fromkeys(name for slot in elsewhere for name in slot.names)
    stray = [name for name in checkpoint.tensors if name not in known]
    extra = [] if resolved is None else resolved.modules_with_buffers(dict(_units(model)))
    for name, module in (*_units(model), *extra):
        placements = [] if resolved is None else resolved.placements(name, module, problems)
        taken = {(id(p.module), p.param, p.slot.part, p.slot.names) for p in placements}
        for holder, param_name, slot in _slots(name, module):
            if (id(holder), param_name, slot.part, slot.names) in taken:
                continue
            names = slot.names if resolved is None else [n for n in slot.names if n not in resolved.places]
            tensor = next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)
            if tensor is None:
                if not (slot.together and slot.part):
                    problems.append(missing(slot, stray if len(problems) < HINTS else ()))
                continue
            used.add(tensor.name)
            problem = mismatch(slot, tensor)
            if problem is not None and problem not in problems:  # the tensor may hold several parts
                problems.append(problem)
            placements.append(Placement(holder, param_name, slot, tensor))
        units.append(Unit(name, module, tuple(placements)))
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
    for tensor_name in checkpoint.tensors:
        if tensor_name in used:
            continue
        reason = _skip_reason(tensor_name, model, rules)
        if reason is None:
            hint = nearest(tensor_name, known) if len(problems) < HINTS else ""
            text = f"unexpected, no layer asks for it. {hint}".strip()
            if tensor_name in known:
                text = "unexpected, a module's resolver fills its place from another tensor"
            problems.append(Problem("unexpected", tensor_name, text))
        else:
            records.append(TensorRecord(tensor_name, "skipped", 0, reason))
    raise_problems(str(checkpoint.path), problems)
    return tuple(units), tuple(records)


class _Resolved:
    """What the modules' own resolvers say of the checkpoint's tensors.

    places: by tensor name.  used: the tensors that found their place, or that are skipped.
    """

    def __init__(self, model: CausalLM, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        said = {name: resolve_weight_spec(model, name, model.config) for name in checkpoint.tensors}
        self.places = {name: place for name, place in said.items() if place is not None}
        self.skipped = [name for name, place in self.places.items() if place.skip]
        self.used = set(self.skipped)

    def modules_with_buffers(self, units: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        """The modules beside `units` that hold a buffer which a tensor goes to."""
        wanted = {id(place.buffer) for place in self.places.values() if place.buffer is not None}
        return [
            (name, module)
            for name, module in self.model.named_modules()
            if name not in units and any(id(buffer) in wanted for buffer in module._buffers.values())
        ]

    def placements(self, unit: str, module: nn.Module, problems: list[Problem]) -> list[Placement]:
        """Those of one unit.  A place that two tensors want, or that a tensor does not fit, is a problem."""
        found: list[Placement] = []
        slots = list(_slots(unit, module)) if module._parameters or module._modules else []
        for name, said in self.places.items():
            tensor = self.checkpoint.tensors[name]
            for buffer_name, buffer in module._buffers.items():
                if buffer is not None and buffer is said.buffer:
                    slot = _whole_slot(unit, buffer_name, buffer)
                    found.append(Placement(module, buffer_name, slot, tensor, said))
                    self.used.add(name)
            for holder, param, slot in slots:
                if said.param is None or holder._parameters[param] is not said.param:
                    continue
                part = None if said.shard_id is None else _part_index(holder, said.shard_id)
                if part not in (None, slot.part):
                    continue
                if any((other.param, other.slot) == (param, slot) for other in found):
                    text = "a second tensor for a place that another one fills"
                    problems.append(Problem("written-twice", name, text))
                simple = said.transform is None and said.loader is None
                if simple and (part is not None or sum(s[1] == param for s in slots) == 1):
                    problem = mismatch(slot, tensor)
                    problems += [] if problem is None else [problem]
                found.append(Placement(holder, param, slot, tensor, said))
                self.used.add(name)
        return found

    def without_place(self) -> list[Problem]:
        """Tensors whose resolver names nothing that this model has."""
        lost = [name for name in self.places if name not in self.used]
        self.used.update(lost)
        text = "its resolver names no parameter (also of a loader of its own) or buffer of this model"
        return [Problem("resolved-weight", name, text) for name in lost]


def _part_index(holder: nn.Module, shard_id: int | str) -> int | None:
    return holder.part_index(shard_id) if isinstance(holder, WeightedLayer) else 0


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        holds_plain = any(
            not hasattr(param, "slots") for param in module._parameters.values() if param is not None
        )
        holds = isinstance(module, (WeightedLayer, Attention)) and module._parameters
        if isinstance(module, Experts) or holds or holds_plain:
            yield name, module


def _slots_elsewhere(model: nn.Module) -> Iterator[Slot]:
    """Of experts that other ranks hold."""
    for module in model.modules():
        if isinstance(module, FusedMoE):
            yield from module.slots_elsewhere()


def _slots(name: str, module: nn.Module) -> Iterator[tuple[nn.Module, str, Slot]]:
    """Every slot of a unit, with the module and parameter it fills."""
    if not isinstance(module, (WeightedLayer, Attention, Experts)):
        for param_name, param in module._parameters.items():
            if param is not None:
                yield module, param_name, _whole_slot(name, param_name, param)
        return
    for holder in module.modules():
        for param_name, param in holder._parameters.items():
            for slot in getattr(param, "slots", ()):
                yield holder, param_name, slot


def _whole_slot(prefix: str, name: str, tensor: Tensor) -> Slot:
    """The one slot of a plain parameter or buffer, which every rank holds in full."""
    spec = WeightSpec(name, tensor.dtype, tuple(map(whole, tensor.shape)), accepts=FLOATS)
    shape = LinearShape(Span.full(1), (Span.full(1),), (prefix,), tensor.dtype)
    return place(spec, shape)[1][0]


def _skip_reason(name: str, model: CausalLM, rules: RuledConfig) -> str | None:
    head = model.lm_head
    if head.tied_to is not None and name.startswith(f"{head.prefix}."):
        return f"the head is tied to {head.tied_to.prefix}"
    for pattern, reason in model.skipped_tensors.items():
        if re.fullmatch(pattern, name):
            return reason
    return rules.skip_reason(name)
