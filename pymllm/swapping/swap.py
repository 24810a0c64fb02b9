"""Another method for some weights of a running model: `swap`, all or nothing, and undoable.

Every layer keeps its place, its shape and its name; what changes is its `quant_method` and its packed weight. All new
weights are made first, from what runs, and put in place together at the end, so that whatever fails on the way
leaves the model untouched. The decisions are those that loading would take, with the swap's rule after all others.
"""

# O out_features, I in_features

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, RuleError
from pymllm.kernels.canonical import CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.layers.embedding import ParallelLMHead
from pymllm.layers.linear import PartHolder, SplitLinearMethod, WeightedLayer, layer_parts, weighted_layers
from pymllm.loading.match import Placement, Unit
from pymllm.loading.prepare import Prepared
from pymllm.parallel import Parallel
from pymllm.planning.make_plan import make_plan
from pymllm.quantization.binding import BoundWeight, bind_for, bind_shared, bound_weight
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import Decision, Rule, RuledConfig
from pymllm.swapping.experts import ExpertsState, choose_experts, encode, experts_of, swapped_experts
from pymllm.weights.loader import place

logger = logging.getLogger("pymllm")

BY_OUTPUT = ("weight", "codes", "scales", "zeros", "offsets", "row_scales")  # canonical tensors with O first


def swap(model: Any, pattern: str, method: str) -> Swap:
    """Run every weight whose checkpoint name matches `pattern` in another format, from now on.

    model: an `LLM`, or what `load_model` returned (a swap of `llm.model` leaves `llm.plan` as it was: pass the `llm`).
    pattern, method: as the two sides of a rule, swap(llm, "**.mlp.**", "int4:group_size=64").

    The weights are decoded from what runs now, not read from the checkpoint: a swap to fewer bits and another one
    back do not restore what rounding took. `undo()` does, bit for bit: the packed tensors are kept until `commit()`,
    so that until then a swap takes the memory of the old weights and of the new ones.

    All or nothing: on any error (an unmatched pattern, an unknown method, a shape that it refuses, no kernel, no
    memory) the model is what it was. Parts of a fused layer that alone match get weights of their own. A tied
    head follows the embedding only if the pattern names both. What runs in that method already stays as it is;
    so does the KV cache, and generations that are under way go on. On several ranks, every rank must call it.

    Returns the `Swap`; in a `with` statement it is undone at the end, unless `commit()` was called.
    Raises RuleError, ConfigError, ShardingError or KernelError.
    """
    with _lock(model):
        root, prepared = _running(model)
        _check_unmerged(root)
        return _swap(model, root, prepared, replace(Rule.parse(f"*={method}"), pattern=pattern))


def _swap(model: Any, root: nn.Module, before: Prepared, rule: Rule) -> Swap:
    states: list[LayerState | ExpertsState] = []
    after = before
    with _together(before.parallel, before.execution.device), torch.no_grad():
        quant = SwappedConfig.over(before.quant, rule)
        wanted = {layer: quant.choose(layer) for layer in weighted_layers(root)}
        experts = {layer: choose_experts(layer, quant) for layer in experts_of(root)}
        quant.check_matched()
        staged = _Staged(quant)
        for layer, methods in wanted.items():
            staged.add(layer, methods)
        states = [*staged.changed(), *filter(None, starmap(swapped_experts, experts.items()))]
        if states:
            after = replace(before, quant=quant, units=_placed_again(before, states))
    changed = [name for name in quant.chosen if _changed(quant, before.quant, name)]
    result = Swap(rule, changed, quant.unchanged, model, before, after, [s.before() for s in states], states)
    if states:
        result._redo()
    logger.info(str(result))
    return result


def _changed(quant: SwappedConfig, before: RuledConfig, name: str) -> bool:
    return quant.decisions[name].method != before.decisions[name].method


@dataclass(eq=False)
class Swap:
    """What `swap` did.  str() says it in a line.

    changed: the names whose method is another now.  unchanged: those that matched and ran in that method already.
    bytes_before, bytes_after: packed, on this rank, of the layers that hold what changed.
    """

    rule: Rule
    changed: list[str]
    unchanged: list[str]
    model: Any = field(repr=False)
    _before: Prepared = field(repr=False)
    _after: Prepared = field(repr=False)
    _old: list[LayerState | ExpertsState] = field(repr=False)
    _new: list[LayerState | ExpertsState] = field(repr=False)
    _plan: Any = field(default=None, repr=False)
    state: str = "done"  # then "undone" or "committed"

    def __post_init__(self) -> None:
        self.bytes_before, self.bytes_after = _nbytes(self._old), _nbytes(self._new)

    @property
    def nothing_to_do(self) -> bool:
        return not self.changed

    def __str__(self) -> str:
        if self.nothing_to_do:
            return (
                f"swap {self.rule}: nothing to do, {len(self.unchanged)} weights run in that method already"
            )
        already = f", {len(self.unchanged)} ran in it already" if self.unchanged else ""
        return f"swap {self.rule}: {len(self.changed)} weights changed{already}; {self.state}"

    def undo(self) -> None:
        """Put the very tensors back that ran before.  ConfigError after `commit`, or under a later swap."""
        with _lock(self.model):
            if self.state == "undone":
                return
            if self.state == "committed":
                raise ConfigError(
                    f"the swap {self.rule} was committed; the weights from before it are gone",
                    code="swap-committed",
                    fix="Load the checkpoint again.",
                )
            if self.nothing_to_do:
                self.state = "undone"
                return
            root, running = _running(self.model)
            _check_unmerged(root)
            if running is not self._after:
                raise ConfigError(
                    f"the swap {self.rule} cannot be undone: another one came after it",
                    code="swap-order",
                    fix="Undo the later one first.",
                )
            _install(self._old)
            self._publish(self._before, self._plan)
            self.state = "undone"
            self._new = []

    def commit(self) -> None:
        """Keep the swap for good, and free the weights from before it."""
        with _lock(self.model):
            if self.state == "undone":
                raise ConfigError(
                    f"the swap {self.rule} was undone already", code="swap-undone", fix="Swap again."
                )
            self.state = "committed"
            self._old = []

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.state == "done":
            self.undo()

    def _redo(self) -> None:
        """Put the new weights in place, and have the plan of an LLM show them; or neither."""
        self._plan = getattr(self.model, "plan", None)
        try:
            _install(self._new)
            self._publish(self._after, None if self._plan is None else make_plan(self._after))
        except BaseException:
            _install(self._old)
            self._publish(self._before, self._plan)
            raise

    def _publish(self, prepared: Prepared, plan: Any) -> None:
        if plan is not None:
            self.model.plan = plan
        for owner in (self.model, prepared.model):
            owner.prepared = prepared


@dataclass(frozen=True, eq=False)
class LayerState:
    """All that a swap changes of a layer: its method, and its packed weight or its parts' ones."""

    layer: WeightedLayer
    method: LinearMethodBase
    bound: BoundWeight | None
    holders: tuple[PartHolder, ...]
    shares_table: bool | None = None

    @classmethod
    def of(cls, layer: WeightedLayer) -> LayerState:
        method = layer.quant_method
        holders = tuple(method.holders(layer)) if isinstance(method, SplitLinearMethod) else ()
        return cls(layer, method, bound_weight(layer), holders, getattr(layer, "shares_table", None))

    def before(self) -> LayerState:
        """What the layer runs now."""
        return LayerState.of(self.layer)

    def same_as(self, other: LayerState) -> bool:
        """The very same tensors in the same method."""
        mine, others = ((s.bound, *s.holders) for s in (self, other))
        same = len(mine) == len(others) and all(a is b for a, b in zip(mine, others, strict=True))
        return same and (self.method, self.shares_table) == (other.method, other.shares_table)

    def install(self) -> None:
        layer = self.layer
        for name in [name for name, child in layer.named_children() if isinstance(child, PartHolder)]:
            delattr(layer, name)
        for index, holder in enumerate(self.holders):
            layer.add_module(f"part_{index}", holder)
        layer.quant_method = self.method
        layer.bound = self.bound  # type: ignore[assignment]
        if isinstance(layer, ParallelLMHead):
            layer.shares_table = bool(self.shares_table)


def _check_unmerged(root: nn.Module) -> None:
    """ConfigError while an adapter lies in the weights: it could not be taken out of other ones again."""
    for layer in weighted_layers(root):
        if layer.merged is not None:
            raise ConfigError(
                f"the adapter {layer.merged.name!r} is merged into the weights",
                code="lora-merged",
                tensor=layer.prefix,
                fix="Unmerge it first.",
            )


def _install(states: Sequence[LayerState | ExpertsState]) -> None:
    for state in states:
        state.install()


def _nbytes(states: Sequence[LayerState | ExpertsState]) -> int:
    weights = [w for s in states for w in (s.bound, *map(bound_weight, s.holders)) if w is not None]
    packed = {tensor.data_ptr(): tensor.nbytes for weight in weights for tensor in weight.packed.values()}
    return sum(packed.values())


class SwappedConfig(RuledConfig):
    """The config of the loaded model, with the rules of swaps over its decisions, the latest last.

    chosen: the names of the model's weights, in its order.  unchanged: those for which the last rule changes nothing.
    """

    def __init__(self, loaded: RuledConfig, swaps: tuple[Rule, ...]) -> None:
        super().__init__(loaded.checkpoint_config, loaded.rules, loaded.kv_rules)
        self.swaps = tuple((rule, rule.build()) for rule in swaps)
        self.decisions, self.kv_decisions = dict(loaded.decisions), loaded.kv_decisions
        self.chosen: list[str] = []
        self.unchanged: list[str] = []

    @classmethod
    def over(cls, config: RuledConfig, rule: Rule) -> SwappedConfig:
        earlier = tuple(rule for rule, _ in config.swaps) if isinstance(config, SwappedConfig) else ()
        return cls(config, (*earlier, rule))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        super().get_quant_method(layer, prefix)
        name = getattr(layer, "prefix", prefix) if getattr(layer, "kind", "linear") == "lm_head" else prefix
        for rule, target in self.swaps:
            decision = self.decisions[name]
            if rule.applies(layer, name) and not _runs_in(decision.method, target, rule):
                converted = ConvertedLinearMethod(decision.method, target)
                self.decisions[name] = Decision(name, converted, "swap", rule)
        return self.decisions[name].method

    def choose(self, layer: WeightedLayer) -> list[LinearMethodBase]:
        """The method of each of the layer's parts."""
        head = layer if isinstance(layer, ParallelLMHead) else None
        return [
            self.choose_one(layer, part, part if head is None else head.prefix) for part in layer.shape.parts
        ]

    def choose_one(self, layer: nn.Module, stored: str, name: str | None = None) -> LinearMethodBase:
        """The method of one weight.  stored: its name in the checkpoint; name: in decisions, if another."""
        method, name = self.get_quant_method(layer, stored) or UnquantizedLinearMethod(), name or stored
        rule = self.swaps[-1][0]
        self.chosen.append(name)
        if rule.applies(layer, name) and self.decisions[name].rule is not rule:
            self.unchanged.append(name)
        return method

    def check_matched(self) -> None:
        """RuleError, with the nearest names, if the last rule matches no weight."""
        rule = self.swaps[-1][0]
        if not any(rule.matches(name) for name in self.chosen):
            raise RuleError(
                f"{rule.pattern!r} matches no weight of this model. {self._hint(rule, self.chosen)}".strip(),
                code="rule-unmatched",
                fix=f"Weights are named like {self.chosen[0]}; see the plan." if self.chosen else None,
            )


def _runs_in(method: LinearMethodBase, target: LinearMethodBase, rule: Rule) -> bool:
    """Whether a weight of `method` is what the rule asks for; one without options takes any of that name."""
    running = method.target if isinstance(method, ConvertedLinearMethod) else method
    return running == target or (running.name == target.name and not rule.options)


class _Staged:
    """The new state of every layer, made without touching one."""

    def __init__(self, quant: SwappedConfig) -> None:
        self.quant = quant
        self.states: dict[WeightedLayer, LayerState] = {}

    def changed(self) -> list[LayerState]:
        return [state for layer, state in self.states.items() if not state.same_as(LayerState.of(layer))]

    def add(self, layer: WeightedLayer, methods: list[LinearMethodBase]) -> None:
        old = LayerState.of(layer)
        if isinstance(layer, ParallelLMHead) and layer.tied_to is not None:
            self.states[layer] = self._head(layer, layer.tied_to, old, methods[0])
        elif len(set(methods)) == 1 and not old.holders:
            self.states[layer] = replace(old, method=methods[0], bound=self._whole(layer, old, methods[0]))
        else:
            self.states[layer] = self._split(layer, old, methods)

    def _whole(self, layer: WeightedLayer, old: LayerState, method: LinearMethodBase) -> BoundWeight:
        assert old.bound is not None
        if method == old.method:
            return old.bound
        method.check(layer.shape)
        return bind_for(layer, encode(old.bound.canonical(), old.method, method, layer.shape))

    def _split(self, layer: WeightedLayer, old: LayerState, methods: list[LinearMethodBase]) -> LayerState:
        """Parts that differ, or that stand alone already: those that do not change keep their weights."""
        former = [method for method, _, _ in layer_parts(layer)]
        if not old.holders:
            former *= len(methods)
        if former == methods:
            return old
        canonical = None if old.bound is None else old.bound.canonical()
        holders = []
        for index, (was, method) in enumerate(zip(former, methods, strict=True)):
            if old.holders and was == method:
                holders.append(old.holders[index])
                continue
            holder = PartHolder(layer, index)
            holder.quant_method = method
            if old.holders:
                bound = bound_weight(old.holders[index])
                assert bound is not None
                weight = bound.canonical()
            else:
                assert canonical is not None
                weight = cut_part(canonical, layer, index, was)
            method.check(holder.shape)
            holder.bound = bind_for(holder, encode(weight, was, method, holder.shape))  # type: ignore[assignment]
            holders.append(holder)
        return LayerState(layer, SplitLinearMethod(tuple(methods)), None, tuple(holders))

    def _head(
        self, head: ParallelLMHead, table: WeightedLayer, old: LayerState, method: LinearMethodBase
    ) -> LayerState:
        """A tied head: as in loading, it shares the embedding's table where their methods are equal."""
        embedding = self.states[table]
        shares = method == embedding.method
        assert embedding.bound is not None
        if shares and not (old.shares_table and embedding.bound is bound_weight(table)):
            assert head.execution is not None  # it was loaded
            bound = bind_shared(embedding.bound, head.execution, "linear")
        else:
            bound = self._whole(head, old, method)
        return replace(old, method=method, bound=bound, shares_table=shares)


def cut_part(
    weight: CanonicalWeight, layer: WeightedLayer, index: int, method: LinearMethodBase
) -> CanonicalWeight:
    """The rows of one part of a fused weight, bit for bit, in tensors of their own."""
    sizes = [span.size for span in layer.shape.outputs]
    start = sum(sizes[:index])
    rows = slice(start, start + sizes[index])
    if isinstance(weight, Fp8Weight):
        weight = _scales_by_row(weight)
    cut: dict[str, Tensor] = {}
    for entry in fields(weight):
        value = getattr(weight, entry.name)
        if not isinstance(value, Tensor):
            continue
        if entry.name in BY_OUTPUT and value.shape[0] == sum(sizes):
            value = value[rows]
        elif entry.name == "input_scales" and value.numel() == len(sizes):
            value = value[index : index + 1]
        cut[entry.name] = value.clone()
    part = replace(weight, **cut)  # type: ignore[arg-type]
    if isinstance(part, Fp8Weight):
        kind = method.planned(layer.shape.part(index)).type
        assert isinstance(kind, Fp8Type)
        part = replace(part, part_sizes=(sizes[index],))
        part = _scales_by_block(part, kind.block[0])
    return part


def _scales_by_row(weight: Fp8Weight) -> Fp8Weight:
    """The same weight with scales for every row, which can be cut anywhere."""
    side, rows = weight.block[0] or weight.shape[0], weight.shape[0]
    scales = weight.scales.repeat_interleave(side, dim=0)[:rows]
    return replace(weight, scales=scales, block=(1, weight.block[1]))


def _scales_by_block(weight: Fp8Weight, side: int) -> Fp8Weight:
    """Scales for every row as scales for `side` rows (0: all) again, where that says the same."""
    rows = weight.shape[0]
    coarse = weight.scales[:: side or rows].contiguous()
    if rows == 0 or not torch.equal(coarse.repeat_interleave(side or rows, dim=0)[:rows], weight.scales):
        return weight
    return replace(weight, scales=coarse, block=(side, weight.block[1]))


def _placed_again(prepared: Prepared, states: Sequence[LayerState | ExpertsState]) -> tuple[Unit, ...]:
    """The units with the places of weights that are on their own now, for `verify` to read them again."""
    layers = [state for state in states if isinstance(state, LayerState)]  # experts stay where they are
    changed = {s.layer: s for s in layers if s.holders or isinstance(s.layer, ParallelLMHead)}
    units = {unit.module: unit for unit in prepared.units}
    result = []
    for unit in prepared.units:
        state = changed.get(unit.module)  # type: ignore[call-overload]
        if state is not None:
            layer = state.layer
            known = [p for p in unit.placements if p.param == "bias"]
            tensors = list(unit.placements)
            if isinstance(layer, ParallelLMHead) and layer.tied_to is not None:
                tensors += units[layer.tied_to].placements
            if not state.shares_table:
                known += _placements(state, tensors)
            unit = replace(unit, placements=tuple(known))
        result.append(unit)
    return tuple(result)


def _placements(state: LayerState, known: list[Placement]) -> list[Placement]:
    by_name = {p.tensor.name: p for p in known}
    parts: list[tuple[LinearMethodBase, nn.Module]] = [(h.quant_method, h) for h in state.holders]
    placements = []
    for method, module in parts or [(state.method, state.layer)]:
        for spec in method.weight_specs(module.shape):  # type: ignore[arg-type]
            for slot in place(spec, module.shape)[1]:  # type: ignore[arg-type]
                found = next(by_name[name] for name in slot.names if name in by_name)
                placements.append(replace(found, module=module, param=spec.name, slot=slot))
    return placements


def _running(model: Any) -> tuple[nn.Module, Prepared]:
    """The module and what `prepare` decided for it.  ConfigError for anything but an LLM or a loaded model."""
    prepared = getattr(model, "prepared", None)
    if not isinstance(prepared, Prepared):
        raise ConfigError(
            "swap takes an LLM, or the module that load_model returned",
            code="swap-argument",
            found=type(model).__name__,
        )
    root = prepared.model
    return root, root.prepared  # type: ignore[return-value]


@contextlib.contextmanager
def _lock(model: Any) -> Iterator[None]:
    """An LLM's turn, so that no forward sees half a swap; a bare module is its caller's to guard."""
    with getattr(model, "_lock", None) or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _together(parallel: Parallel, device: str) -> Iterator[None]:
    """Every rank fails if one does."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if parallel.size > 1 and parallel.group is not None:
        failed = parallel.all_reduce(torch.tensor([0.0 if error is None else 1.0], device=device))
        if error is None and float(failed) > 0:
            error = ConfigError("another rank could not swap its share; none has", code="swap-rank")
    if error is not None:
        raise error
