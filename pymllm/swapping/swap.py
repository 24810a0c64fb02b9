"""`swap`: another method for some weights of a running model, all or nothing, and undoable.

Every layer keeps its place, its shape and its name; what changes is its `quant_method` and its packed weight. All new
weights are made first, from what runs, and put in place together at the end, so that whatever fails on the way
leaves the model untouched. The decisions are those that loading would take, with the swap's rule after all others.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pymllm.arguments import checked
from pymllm.errors import ConfigError, RuleError, counted
from pymllm.layers.held import HolderState, WeightHolder, weight_holders
from pymllm.layers.weighted import weighted_layers
from pymllm.loading.match import Placement, Unit
from pymllm.loading.prepare import Prepared
from pymllm.parallel import Parallel
from pymllm.planning.make_plan import make_plan
from pymllm.planning.plan import Plan
from pymllm.quantization.rules import Rule, RuledConfig, RuleSource, read_rules
from pymllm.swapping.rules import SwappedConfig
from pymllm.weights.loader import place
from pymllm.weights.spec import LinearShape

logger = logging.getLogger("pymllm")


@checked()
def swap(model: Any, pattern: RuleSource, method: str | None = None) -> Swap:
    """Run every weight whose checkpoint name matches `pattern` in another format, from now on.

    model: an `LLM`, or what `load_model` returned (a swap of `llm.model` leaves `llm.plan` as it was: pass the `llm`).
    pattern: of checkpoint names, "**.mlp.**" say, as on the left of a rule; without a method, whole rules as loading
    takes them, "@FILE" too, of which the first that matches a weight decides.
    method: "int4:group_size=64" say, as on the right of a rule.

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
        _check_not_led(prepared.parallel)
        return _swap(model, root, prepared, _read(pattern, method))


def _read(pattern: RuleSource, method: str | None) -> tuple[Rule, ...]:
    """Read what `swap` was asked for.  RuleError for what is no rule, and for none."""
    if method is not None and isinstance(pattern, str):
        return (replace(Rule.parse(f"*={method}"), pattern=pattern),)
    rules = read_rules(pattern) if method is None else ()
    if not rules:
        raise RuleError(
            "swap takes a pattern and a method, or rules alone",
            code="rule-syntax",
            expected='swap(model, "**.mlp.**", "int8"), or swap(model, "@rules.txt")',
            found=f"{pattern!r}, {method!r}",
        )
    return rules


def _swap(model: Any, root: nn.Module, before: Prepared, rules: tuple[Rule, ...]) -> Swap:
    """Make all new states, then put them in place.

    model: what the caller passed.  root: the module with the weights.  before: what it runs as now.
    """
    states: list[HolderState] = []
    after = before
    with _together(before.parallel, before.execution.device), torch.no_grad():
        quant = SwappedConfig(before.quant, rules)
        holders = [holder for _, holder in weight_holders(root)]
        wanted = {holder: [quant.choose(holder, part) for part in holder.parts()] for holder in holders}
        quant.check_matched()
        staged: dict[WeightHolder, HolderState] = {}
        for holder, methods in wanted.items():
            old, new = holder.packed_state(), holder.swapped(methods, staged)
            if old is not None and new is not None:
                staged[holder] = new
                if not new.same_as(old):
                    states.append(new)
        if states:
            after = replace(before, quant=quant, units=_placed_again(before.units, states))
    changed = [name for name in quant.chosen if _changed(quant, before.quant, name)]
    olds = [old for state in states if (old := state.layer.packed_state()) is not None]
    result = Swap(rules, changed, quant.unchanged, model, before, after, olds, states)
    if states:
        result._redo()
    logger.info(str(result))
    return result


def _changed(quant: SwappedConfig, before: RuledConfig, name: str) -> bool:
    return quant.decisions[name].method != before.decisions[name].method


@dataclass(eq=False)
class Swap:
    """One swap that was done.  str() says it in a line.

    changed: the names whose method is another now.  unchanged: those that matched and ran in that method already.
    model: what was passed to `swap`.  state: "done", then "undone" or "committed".
    bytes_before, bytes_after: packed, on this rank, of the layers that hold what changed.
    """

    rules: tuple[Rule, ...]
    changed: list[str]
    unchanged: list[str]
    model: Any = field(repr=False)
    _before: Prepared = field(repr=False)
    _after: Prepared = field(repr=False)
    _old: list[HolderState] = field(repr=False)
    _new: list[HolderState] = field(repr=False)
    _plan: Plan | None = field(default=None, repr=False)
    state: str = "done"

    def __post_init__(self) -> None:
        self.bytes_before, self.bytes_after = _nbytes(self._old), _nbytes(self._new)

    @property
    def name(self) -> str:
        """The rule, or how many there are."""
        return str(self.rules[0]) if len(self.rules) == 1 else f"by {counted(len(self.rules), 'rule')}"

    @property
    def nothing_to_do(self) -> bool:
        return not self.changed

    def __str__(self) -> str:
        if self.nothing_to_do:
            there = counted(len(self.unchanged), "weight runs", "weights run")
            return f"swap {self.name}: nothing to do, {there} in that method already"
        already = f", {len(self.unchanged)} ran in it already" if self.unchanged else ""
        return f"swap {self.name}: {counted(len(self.changed), 'weight')} changed{already}; {self.state}"

    def undo(self) -> None:
        """Put the very tensors back that ran before.  ConfigError after `commit`, or under a later swap."""
        with _lock(self.model):
            if self.state == "undone":
                return
            if self.state == "committed":
                raise ConfigError(
                    f"the swap {self.name} was committed; the weights from before it are gone",
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
                    f"the swap {self.name} cannot be undone: another one came after it",
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
                    f"the swap {self.name} was undone already", code="swap-undone", fix="Swap again."
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
            # The KV cache stays as it is.
            plan = self._plan and replace(make_plan(self._after), kv_cache=self._plan.kv_cache)
            self._publish(self._after, plan)
        except BaseException:
            _install(self._old)
            self._publish(self._before, self._plan)
            raise

    def _publish(self, prepared: Prepared, plan: Plan | None) -> None:
        """Have the model, and an LLM around it, say what runs now."""
        if plan is not None:
            self.model.plan = plan
        for owner in (self.model, prepared.model):
            owner.prepared = prepared


def _check_unmerged(root: nn.Module) -> None:
    """Refuse a swap while an adapter lies in the weights: it could not be taken out of other ones again."""
    for layer in weighted_layers(root):
        if layer.merged is not None:
            raise ConfigError(
                f"the adapter {layer.merged.name!r} is merged into the weights, and could not be taken out of others",
                code="lora-merged",
                tensor=layer.prefix,
                fix="Unmerge it first.",
            )


def _check_not_led(parallel: Parallel) -> None:
    """Refuse a swap where other ranks follow this one, which does not tell them of it."""
    if parallel.led:
        raise ConfigError(
            "a swap cannot be told to the ranks that follow this one",
            code="swap-rank",
            fix="Load the model with these rules, or start all ranks with torchrun, where each calls swap.",
        )


def _install(states: Sequence[HolderState]) -> None:
    for state in states:
        state.install()


def _nbytes(states: Sequence[HolderState]) -> int:
    """Count the bytes of packed tensors; those that layers share count once."""
    weights = [weight for state in states for weight in state.packed()]
    packed = {tensor.data_ptr(): tensor.nbytes for weight in weights for tensor in weight.packed.values()}
    return sum(packed.values())


def _placed_again(units: Sequence[Unit], states: Sequence[HolderState]) -> tuple[Unit, ...]:
    """Return the units with the places of weights that are on their own now, for `verify` to read them again."""
    known = {p.tensor.name: p for unit in units for p in unit.placements}
    changed = {state.layer: state for state in states if state.rearranged}
    result = []
    for unit in units:
        state = changed.get(unit.holder)
        if state is not None:
            # Packing has taken the parameters of the others.
            kept = [p for p in unit.placements if p.param in p.module._parameters]
            unit = replace(unit, placements=(*kept, *_placements(state, known)))
        result.append(unit)
    return tuple(result)


def _placements(state: HolderState, known: Mapping[str, Placement]) -> Iterator[Placement]:
    """Place the tensors of a state's weights.  known: where they were, by their names."""
    for weight in state.held():
        assert isinstance(weight.shape, LinearShape)
        for spec in weight.method.weight_specs(weight.shape):
            for slot in place(spec, weight.shape)[1]:
                found = next(known[name] for name in slot.names if name in known)
                yield replace(found, module=weight.stored_in, param=spec.name, slot=slot)


def _running(model: Any) -> tuple[nn.Module, Prepared]:
    """Find the module and what it runs as now.  ConfigError for anything but an LLM or a loaded model."""
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
    """Take an LLM's turn, so that no forward sees half a swap.  A bare module is its caller's to guard."""
    with getattr(model, "_lock", None) or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _together(parallel: Parallel, device: str) -> Iterator[None]:
    """Fail on every rank if one does, within a `with` block.  device: of the tensor that the ranks exchange."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if parallel.size > 1 and parallel.group is not None:
        failed = parallel.all_reduce(torch.tensor([0.0 if error is None else 1.0], device=device))
        if error is None and float(failed) > 0:
            error = ConfigError(
                "another rank could not swap its share, so that no rank has swapped",
                code="swap-rank",
                fix="Read the error of that rank.",
            )
    if error is not None:
        raise error
