"""The rules of a swap over the decisions that loading, and the swaps before it, took."""

from __future__ import annotations

from collections.abc import Sequence

from pymllm.errors import RuleError
from pymllm.layers.held import HeldPart, WeightHolder
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rules import Decision, Rule, RuledConfig


class SwappedConfig(RuledConfig):
    """The config of a running model, with the rules of one more swap over its decisions.

    chosen: the names of the model's weights, in its order.  unchanged: those that a rule names and that run in its
    method already.
    """

    def __init__(self, running: RuledConfig, rules: Sequence[Rule]) -> None:
        super().__init__(running.checkpoint_config, running.rules, running.kv_rules)
        self.swap_rules = {rule: rule.build() for rule in rules}
        self.decisions, self.kv_decisions = dict(running.decisions), running.kv_decisions
        self.chosen: list[str] = []
        self.unchanged: list[str] = []

    def choose(self, holder: WeightHolder, part: HeldPart) -> LinearMethodBase:
        """Return the method that a weight should have from now on, and remember its name."""
        self.chosen.append(part.name)
        running = self.decisions[part.name].method
        rule = next(
            (rule for rule in self.swap_rules if rule.applies(holder, *self.spellings(part.name))), None
        )
        if rule is not None:
            target = self.swap_rules[rule]
            if _runs_in(running, target, rule):
                self.unchanged.append(part.name)
            else:
                converted = ConvertedLinearMethod(running, target)
                self.decisions[part.name] = Decision(part.name, converted, "swap", rule)
        return self.decisions[part.name].method

    def check_matched(self) -> None:
        """Refuse a rule that matches no weight.  RuleError with the nearest names."""
        for rule in self.swap_rules:
            if not any(rule.matches(*self.spellings(name)) for name in self.chosen):
                raise RuleError(
                    f"{rule.pattern!r} matches no weight of this model. {self._hint(rule, self.chosen)}".strip(),
                    code="rule-unmatched",
                    fix=f"Weights are named like {self.chosen[0]}; see the plan." if self.chosen else None,
                )


def _runs_in(method: LinearMethodBase, target: LinearMethodBase, rule: Rule) -> bool:
    """Return whether a weight of `method` is what the rule asks for; one without options takes any of that name."""
    running = method.target if isinstance(method, ConvertedLinearMethod) else method
    return running == target or (running.name == target.name and not rule.options)
