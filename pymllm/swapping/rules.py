"""The rules of swaps over the decisions that loading took."""

from __future__ import annotations

from torch import nn

from pymllm.errors import RuleError
from pymllm.layers.held import HeldPart
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase, kind_of
from pymllm.quantization.rules import Decision, Rule, RuledConfig


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
        name = getattr(layer, "prefix", prefix) if kind_of(layer) == "lm_head" else prefix
        for rule, target in self.swaps:
            decision = self.decisions[name]
            if rule.applies(layer, name) and not _runs_in(decision.method, target, rule):
                converted = ConvertedLinearMethod(decision.method, target)
                self.decisions[name] = Decision(name, converted, "swap", rule)
        return self.decisions[name].method

    def choose(self, layer: nn.Module, part: HeldPart) -> LinearMethodBase:
        """Return the method that a weight of the layer should have, and remember its name."""
        method = self.get_quant_method(layer, part.stored) or UnquantizedLinearMethod()
        rule = self.swaps[-1][0]
        self.chosen.append(part.name)
        if rule.applies(layer, part.name) and self.decisions[part.name].rule is not rule:
            self.unchanged.append(part.name)
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
