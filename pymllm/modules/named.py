"""What rules name in a torch module: the modules that can be replaced, and the weights that cannot, with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import RuleError, counted, first_few
from pymllm.modules.experts import QuantizedExperts
from pymllm.modules.experts_job import PRODUCTS, ExpertsJob
from pymllm.modules.foreign_experts import read_experts, stacks_of
from pymllm.modules.foreign_matrices import is_matrix, read_matrix
from pymllm.modules.jobs import Job, MatrixJob, StackJob
from pymllm.modules.layers import QuantizedLayer, QuantizedStack
from pymllm.modules.report import QuantizedModule
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.rules import Decision, Rule, RuledConfig
from pymllm.weights.spec import FLOATS

BIAS = "a bias is added in floats, and is no weight"
OURS = (QuantizedLayer, QuantizedExperts, QuantizedStack)


@dataclass(frozen=True)
class Unreached:
    """A weight that a rule names and that cannot be replaced."""

    name: str
    weights: Mapping[str, Tensor]
    kind: str
    rule: Rule
    method: str
    reason: str

    @classmethod
    def of(
        cls, name: str, weights: Mapping[str, Tensor], module: nn.Module, decision: Decision, reason: str
    ) -> Unreached:
        """Note what a rule's decision cannot change."""
        assert decision.rule is not None
        method = decision.method.target.describe()
        return cls(name, weights, type(module).__name__, decision.rule, method, reason)

    @property
    def sweeping(self) -> bool:
        """True if the rule names all that lies below a prefix, and not this weight in particular."""
        return self.rule.pattern.split(".")[-1] == "**" and not self.rule.pattern.startswith("re:")

    def row(self) -> QuantizedModule:
        """Report that the weight stays as it is."""
        nbytes = sum(weight.nbytes for weight in self.weights.values())
        return QuantizedModule(
            prefix=self.name,
            kind=self.kind,
            rule=str(self.rule),
            method=self.method,
            kernel="",
            numerics="",
            bytes_before=nbytes,
            bytes_after=nbytes,
            reason=self.reason,
        )


class Named:
    """The modules that rules name below `root`, as jobs, and the weights that stay, with the reasons.

    RuleError for a rule without effect, and for two methods for one module.
    """

    def __init__(self, root: nn.Module, config: RuledConfig) -> None:
        self.config = config
        self.jobs: list[Job] = []
        self.decided: dict[tuple[Job, str], Decision] = {}  # about each of a job's weights
        self.unreached: list[Unreached] = []
        self.replaceable: list[str] = []  # all names that a rule could have named
        places: dict[nn.Module, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            places.setdefault(module, []).append(name)
        inside: set[nn.Module] = set()
        for module, names in places.items():
            if module in inside:
                continue
            if isinstance(module, OURS):
                inside.update(module.modules())
            elif is_matrix(module):
                self._name_matrix(module, names)
            elif stacks_of(module):
                self._name_experts(module, names)
                inside.update(holders_of(module))
            else:
                held = {name: p for name, p in module._parameters.items() if p is not None}
                reason = (
                    f"its class, {type(module).__name__}, is no linear layer, embedding or stack of experts"
                )
                self._name_parameters(module, names, held, reason)
        self._lint()

    def refuse(self, job: Job, reason: str) -> None:
        """Count a job's weights among those that cannot be replaced."""
        self.jobs.remove(job)
        for name, weight in job.weights().items():
            path = job.name if name == "weight" else _below(job.name, name)
            self._leave({name: weight}, path, self.decided[job, name], job.module, reason)

    def take_jobs(self) -> list[Job]:
        """Hand the jobs over, and keep nothing that holds their modules' weights."""
        jobs, self.jobs = self.jobs, []
        self.decided.clear()
        return jobs

    def check(self) -> None:
        """Check that what stays as it is does so by a rule that ends in `**`, and that something is replaced.

        RuleError lists all else.
        """
        named = self.unreached if not self.jobs else [each for each in self.unreached if not each.sweeping]
        if not named:
            return
        alike: dict[tuple[Rule, str], list[str]] = {}
        for each in named:
            reason = each.reason.replace(f"{each.name}: ", "") if each.name else each.reason
            reason = reason.rstrip(".")
            alike.setdefault((each.rule, reason), []).append(each.name)
        lines = [f"{', '.join(names)} ({rule}): {reason}" for (rule, reason), names in alike.items()]
        briefly = [f"{first_few(names)} ({rule}): {reason}" for (rule, reason), names in alike.items()]
        many = f"{counted(len(named), 'weight')} that" if len(named) > 1 else "a weight that"
        raise RuleError(
            f"{many} the rules name cannot be quantised: " + "; ".join(lines),
            brief=f"{many} the rules name cannot be quantised: " + first_few(briefly, "; "),
            code="module-unsupported",
            fix="Leave them out with a rule NAME=none before the others, or name them by a pattern that ends in `**`: "
            "what that cannot change is listed in module.quantization."
            if self.jobs or any(not each.sweeping for each in named)
            else None,
        )

    def _decide(self, module: nn.Module, names: Sequence[str]) -> Decision | None:
        """Return the decision of the first rule that matches one of a weight's names; None: no rule does.

        names: the weight's own, and that of the module that has it.
        """
        config = self.config
        for name in names:
            config.get_quant_method(module, name)
        found = [config.decisions[name] for name in names if config.decisions[name].rule is not None]
        if not found:
            return None
        order = {id(rule): index for index, rule in reversed(list(enumerate(config.rules)))}
        first = min(found, key=lambda decision: order[id(decision.rule)])
        config.decisions[names[0]] = replace(first, prefix=names[0])
        return first

    def _decide_all(self, module: nn.Module, places: Sequence[Sequence[str]]) -> Decision | None:
        """Return the decision about a weight at all its places.  RuleError if they have different methods."""
        named = [decision for names in places if (decision := self._decide(module, names)) is not None]
        if len({decision.method for decision in named}) > 1:
            raise RuleError(
                f"one module stands at {' and '.join(names[0] for names in places)}, "
                "and the rules give it different methods",
                code="rule-conflict",
                fix="Give all its names the same method.",
            )
        return named[0] if named else None

    def _name_matrix(self, module: nn.Module, names: list[str]) -> None:
        self.replaceable += names
        decision = self._decide_all(module, [[name] for name in names])
        if decision is None or not isinstance(decision.method, ConvertedLinearMethod):
            return
        weight = module._parameters.get("weight", getattr(module, "weight", None))
        facts = why_not(module, names[0], [weight]) or read_matrix(module)
        if isinstance(facts, str):
            held = {"weight": weight} if isinstance(weight, Tensor) else {}
            self._leave(held, names[0], decision, module, facts)
            return
        kind = StackJob if facts.kind == "stack" else MatrixJob
        job = kind(tuple(names), module, facts, decision.method, str(decision.rule))
        self.jobs.append(job)
        self.decided[job, "weight"] = decision

    def _name_experts(self, module: nn.Module, names: list[str]) -> None:
        stacks = stacks_of(module)
        decisions: dict[str, Decision] = {}
        for stack in stacks:
            places = [list(_paths(name, stack)) for name in names]
            self.replaceable += [place[0] for place in places]
            decision = self._decide_all(module, places)
            if decision is not None and isinstance(decision.method, ConvertedLinearMethod):
                decisions[stack] = decision
        self._name_parameters(module, names, biases_of(module, stacks), BIAS)
        if not decisions:
            return
        held = {stack: module.get_parameter(stack) for stack in stacks}
        said = (why_not(each, names[0], list(held.values())) for each in (module, *holders_of(module)))
        facts = next(filter(None, said), None) or read_experts(module)
        if not isinstance(facts, str):
            first = [decisions.get(name) for name in facts.gate_up]
            if len({decision and decision.method for decision in first}) > 1:
                facts = f"{' and '.join(facts.gate_up)} are packed together, and the rules give them different methods"
        if isinstance(facts, str):
            for stack, decision in decisions.items():
                self._leave({stack: held[stack]}, _below(names[0], stack), decision, module, facts)
            return
        by_product = dict(zip(PRODUCTS, (facts.gate_up[0], facts.down), strict=True))
        methods = {
            product: self.config.decisions[_below(names[0], stack)].method
            for product, stack in by_product.items()
        }
        rules = {
            product: str(decisions[stack].rule) for product, stack in by_product.items() if stack in decisions
        }
        job = ExpertsJob(tuple(names), module, facts, methods, rules)
        self.jobs.append(job)
        self.decided |= {(job, stack): decision for stack, decision in decisions.items()}

    def _name_parameters(
        self, module: nn.Module, names: list[str], held: Mapping[str, Tensor], reason: str
    ) -> None:
        """Note the rules that name parameters with two dimensions or more that nothing here replaces."""
        for name, parameter in held.items():
            if parameter.ndim < 2:
                continue
            own = [place if name == "weight" and place else _below(place, name) for place in names]
            above = names if reason != BIAS else [""] * len(names)
            places = [list(dict.fromkeys(filter(None, pair))) for pair in zip(own, above, strict=True)]
            if not any(
                rule.matches(each) for rule in self.config.rules for place in places for each in place
            ):
                continue
            decision = self._decide_all(module, places)
            if decision is None or not isinstance(decision.method, ConvertedLinearMethod):
                continue
            left = Unreached.of(own[0], {name: parameter}, module, decision, reason)
            # Whoever writes "**.experts.*" means the weights.
            if reason != BIAS or left.sweeping or not left.rule.pattern.endswith("*"):
                self.unreached.append(left)

    def _leave(
        self, held: Mapping[str, Tensor], name: str, decision: Decision, module: nn.Module, reason: str
    ) -> None:
        self.unreached.append(Unreached.of(name, held, module, decision, reason))

    def _lint(self) -> None:
        try:
            self.config.lint()
        except RuleError as error:
            known = self.replaceable
            error.fix = (
                f"Name modules like {known[0]}." if known else "The module has none that a rule can name."
            )
            error.args = (str(error),)
            raise


def why_not(module: nn.Module, name: str, weights: Sequence[Any]) -> str | None:
    """Say what would be lost if a module were replaced, or why its weights cannot be read; None: nothing."""
    if not name:
        return (
            "the module itself cannot be replaced in place: wrap it in another, in nn.Sequential for example"
        )
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "it has hooks, which a replacement would lose"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization"
    if getattr(module, "max_norm", None) is not None:
        return "its max_norm changes the weight while it runs"
    for weight in weights:
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            return "its weight holds no floats"
        if not weight.numel():
            return "its weight is empty"
        floats = weight.detach() if weight.dtype in FLOATS else weight.detach().float()
        if not all(bool(edge.isfinite()) for edge in torch.aminmax(floats)):
            return "its weight has values that are NaN or infinite"
    return None


def holders_of(module: nn.Module) -> set[nn.Module]:
    """Return the submodules that hold a module's stacks of experts."""
    return {module.get_submodule(path) for stack in stacks_of(module) if (path := stack.rpartition(".")[0])}


def _paths(name: str, stack: str) -> Iterator[str]:
    """Yield the path of a stack, then those of the modules that have it, up to that of the experts."""
    path = _below(name, stack)
    while len(path) > len(name):
        yield path
        path = path.rpartition(".")[0]
    if name:
        yield name


def biases_of(module: nn.Module, stacks: Sequence[str]) -> dict[str, Tensor]:
    """Return the biases beside a module's stacks of experts."""
    names = [f"{stack}_bias" for stack in stacks]
    return {name: bias for name in names if (bias := module._parameters.get(name)) is not None}


def _below(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter
