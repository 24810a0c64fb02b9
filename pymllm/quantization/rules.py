"""The user's rules over the checkpoint's own config: which method every layer has, and why.

A rule is `pattern=method[:key=value,...]`. Rules are ordered, and the first one that matches a layer decides. A pattern
stands for whole checkpoint names of layers, unfused. It is such a name, or a glob over its dotted segments (`*` matches
within one segment, `**` any number of segments), or `re:` and a regular expression that matches the whole name.

    **.mlp.**=fp8
    model.layers.0.**=none
    lm_head=fp8:granularity=block
"""

from __future__ import annotations

import functools
import itertools
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from pymllm.config import current_execution
from pymllm.errors import NEAREST, ConfigError, RuleError, counted, first_few, nearest
from pymllm.patterns import EXPECTED, Pattern
from pymllm.quantization.base import QuantizationConfig, get_target_config
from pymllm.quantization.converted import ConvertedLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.kv_cache import (
    KVCacheMethodBase,
    QuantizedKVCacheMethod,
    UnquantizedKVCacheMethod,
    build_kv_method,
    skip_kv_tensor,
)
from pymllm.quantization.method import LinearMethodBase, kind_of
from pymllm.quantization.storage.fields import refuse_other_than_zeros
from pymllm.weights.report import Skip
from pymllm.weights.spec import LinearShape

RULE = re.compile(r"(?P<pattern>.+?)=(?P<method>[A-Za-z_][\w-]*)(?::(?P<options>.*))?")
RULE_OPTIONS = re.compile(r":.*")
RuleSource = str | Path | Mapping[str, str] | Iterable[str] | None


@dataclass(frozen=True)
class Rule:
    """One rule of the user's."""

    pattern: str
    method: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.pattern}={self.method}" + (f":{options}" if options else "")

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read `pattern=method[:key=value,...]`.  RuleError if it is not of that form."""
        found = RULE.fullmatch(text.strip())
        if found is None:
            raise RuleError(
                f"the rule {text!r} cannot be read",
                code="rule-syntax",
                expected="PATTERN=METHOD or PATTERN=METHOD:key=value,...",
                found=text,
                fix="For example: --quant '**.mlp.**=fp8'.",
            )
        options = []
        for option in filter(None, (found["options"] or "").split(",")):
            key, equals, value = option.partition("=")
            if not equals or not key.strip():
                raise RuleError(
                    f"the option {option!r} of the rule {text!r} has no name or no value",
                    code="rule-syntax",
                    expected="key=value",
                    found=option,
                )
            options.append((key.strip(), value.strip()))
        rule = cls(found["pattern"], found["method"], tuple(options))
        _compile(rule.pattern)
        return rule

    def matches(self, *names: str) -> bool:
        """Tell whether the pattern stands for one of a layer's names."""
        return any(_means(self.pattern, name) for name in names)

    @property
    def sweeping(self) -> bool:
        """True if the pattern is for whatever has a name of some form, and not for one name in particular."""
        return self.pattern.endswith("*") or self.pattern.startswith("re:")

    def applies(self, layer: nn.Module, *names: str) -> bool:
        """Tell whether the rule is for this layer: whether it matches one of the layer's names.

        A rule is for a router only if its pattern names the router to the end. One that ends in "*", or that is a
        regular expression, is meant for the layers that one quantises, and a router is not among them.
        """
        vague = self.pattern.endswith("*") or self.pattern.startswith("re:")
        return not (vague and kind_of(layer) == "router") and self.matches(*names)

    def build(self) -> LinearMethodBase:
        """Make the method that the rule asks for.  ConfigError for an unknown method or option."""
        return get_target_config(self.method).from_options(dict(self.options))


@functools.lru_cache(maxsize=65536)
def _means(pattern: str, name: str) -> bool:
    return _compile(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=1024)
def _compile(pattern: str) -> Pattern:
    """Compile a pattern to a regular expression over the whole name.

    RuleError if `re:` precedes what is none, or when it is matched if that would take forever.
    """
    if pattern.startswith("re:"):
        return Pattern(pattern[3:], functools.partial(_pattern_error, pattern))
    any_segments = r"(?:[^.]+\.)*"
    *heads, last = pattern.split(".")
    expression = "".join(any_segments if head == "**" else _segment(head) + r"\." for head in heads)
    if last != "**":
        expression += _segment(last)
    else:  # A closing "**" also takes nothing: "a.**" names "a" itself.
        expression = expression.removesuffix(r"\.") + r"(?:\.[^.]+)*" if heads else ".*"
    return Pattern(expression, functools.partial(_pattern_error, pattern))


def _pattern_error(pattern: str, problem: str) -> RuleError:
    return RuleError(
        f"the pattern {pattern[:200]!r} of a rule is {problem}",
        code="rule-syntax",
        expected=EXPECTED
        if pattern.startswith("re:")
        else "a name, or a glob of at most a few hundred characters",
        found=repr(pattern[:200]),
    )


def _segment(glob: str) -> str:
    return re.escape(glob).replace(r"\*", "[^.]*").replace(r"\?", "[^.]")


def read_rules(source: RuleSource) -> tuple[Rule, ...]:
    """Read rules from a mapping, a list of lines, one line, or a file of them.

    A file is a Path, or "@FILE"; a line of it that starts with # is a comment.  RuleError for a rule that cannot be
    read, or a file.
    """
    if source is None:
        return ()
    if isinstance(source, str) and not source.startswith("@"):
        return (Rule.parse(source),)
    if isinstance(source, (str, Path)):
        path = Path(str(source).removeprefix("@"))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RuleError(f"the rules cannot be read: {error}", code="rule-file", file=str(path)) from None
        return tuple(Rule.parse(line) for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if isinstance(source, Mapping):
        return tuple(Rule.parse(f"{pattern}={method}") for pattern, method in source.items())
    if not isinstance(source, Iterable):
        raise RuleError(
            "the rules are neither text, nor a list, nor a mapping",
            code="rule-syntax",
            expected="PATTERN=METHOD, a list of such, or {PATTERN: METHOD}",
            found=reprlib.repr(source),
        )
    rules: list[Rule] = []
    for line in source:
        rules.extend(read_rules(line))
    return tuple(rules)


def is_method_alone(text: str) -> bool:
    """Tell whether a text is a method with its options, and no pattern before it: "int4:group_size=64"."""
    plain = bool(text) and text[0] != "@" and not text.startswith("re:")
    return plain and "=" not in RULE_OPTIONS.sub("", text)


def read_kv_rules(source: RuleSource) -> tuple[Rule, ...]:
    """Read rules for attention layers, as `read_rules` does.  A method alone is for all layers: "fp8" is "**=fp8"."""
    if isinstance(source, str) and is_method_alone(source):
        source = f"**={source}"
    if source is None or isinstance(source, (str, Path, Mapping)) or not isinstance(source, Iterable):
        return read_rules(source)
    return tuple(rule for line in source for rule in read_kv_rules(line))


@dataclass(frozen=True)
class Decision:
    """A layer's method and the reason for it.

    prefix: the layer's checkpoint name.  source: "rule", or what in the checkpoint decided.  rule: the user's, or None.
    """

    prefix: str
    method: Any
    source: str
    rule: Rule | None = None


class RuledConfig(QuantizationConfig):
    """The checkpoint's config with the user's rules over it.  It remembers every decision.

    decisions: by checkpoint name, in the order in which layers were built.  kv_rules, kv_decisions: the same for the
    KV cache of attention layers, to which rules for weights do not apply.  sources: what has decided about a layer
    before its format is asked.
    """

    def __init__(
        self, checkpoint_config: QuantizationConfig, rules: Iterable[Rule] = (), kv_rules: Iterable[Rule] = ()
    ) -> None:
        self.checkpoint_config = checkpoint_config
        self.rules, self.kv_rules = tuple(rules), tuple(kv_rules)
        self.kv_targets = {rule: build_kv_method(rule.method, dict(rule.options)) for rule in self.kv_rules}
        self.kv_decisions: dict[str, Decision] = {}
        self.stored, self.stored_modules = checkpoint_config.stored, checkpoint_config.stored_modules
        self.names = checkpoint_config.names
        self.targets = {rule: rule.build() for rule in self.rules}
        self.decisions: dict[str, Decision] = {}
        self.sources: dict[str, str] = {}
        self.fused: list[tuple[str, ...]] = []
        self.outputs: dict[str, int] = {}  # of linear layers, by name
        self.unreached: dict[str, str] = {}  # weights that no rule can quantise, and why, by name

    @classmethod
    def get_name(cls) -> str:
        return "rules"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> RuledConfig:
        raise TypeError("rules come from the user, not from a config file")

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """Return the method of the layer named `prefix`.  A tied head reads its table under the embedding's name."""
        name = getattr(layer, "prefix", prefix) if kind_of(layer) == "lm_head" else prefix
        shape = getattr(layer, "shape", None)
        if isinstance(shape, LinearShape) and prefix in shape.parts:
            shape = shape.part(shape.parts.index(prefix))
        if kind_of(layer) == "linear" and (outputs := getattr(shape or layer, "out_features", 0)):
            self.outputs[prefix] = outputs
        config = self.checkpoint_config
        stored = config.get_quant_method(layer, prefix) or UnquantizedLinearMethod(
            getattr(layer, "transposed", False)
        )
        if stored == UnquantizedLinearMethod():
            stored = UnquantizedLinearMethod(dtype=getattr(layer, "kept_dtype", None))
        decision = Decision(name, stored, self._checkpoint_source(stored, name, prefix))
        rule = next((rule for rule in self.rules if rule.applies(layer, *self.spellings(name))), None)
        if rule is not None:
            decision = Decision(name, self._convert(stored, rule), "rule", rule)
        self.decisions[name] = decision
        return decision.method

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """Return how the attention layer named `prefix` stores keys and values.

        The user's rule decides, else the checkpoint; but compute=exact rounds nothing unless the user asks for it.
        """
        rule = next((rule for rule in self.kv_rules if rule.matches(*self.spellings(prefix))), None)
        method = None if rule is None else self.kv_targets[rule]
        source = "rule" if method is not None else "default"
        if method is None:
            execution = current_execution()
            exact = execution is not None and execution.compute == "exact"
            try:
                method = self.checkpoint_config.get_kv_cache_method(layer, prefix)
            except ConfigError:  # the checkpoint asks for a scheme that no method implements
                if not exact:
                    raise
                source = "compute=exact"
            if method is not None:
                source = "compute=exact" if exact else "quantization_config"
                method = None if exact else method
        if isinstance(method, QuantizedKVCacheMethod):
            shape: Any = layer.shape
            stored, module = self.checkpoint_config.stored, prefix.rpartition(".")[0]
            method = method.with_stored_scales(stored, module, shape.out_features)
        decision = Decision(prefix, method or UnquantizedKVCacheMethod(), source, rule)
        self.kv_decisions[prefix] = decision
        return decision.method

    def _convert(self, stored: LinearMethodBase, rule: Rule) -> LinearMethodBase:
        target = self.targets[rule]
        already = target == stored or (target.name == stored.name and not rule.options)
        return stored if already else ConvertedLinearMethod(stored, target)

    def _checkpoint_source(self, stored: LinearMethodBase, name: str, prefix: str) -> str:
        overruled = self.sources.get(name) or self.checkpoint_config.overruled.get(prefix)
        if overruled is not None:
            return overruled
        if not isinstance(stored, UnquantizedLinearMethod):
            return "quantization_config"
        unquantised = self.checkpoint_config.get_name() == "none"
        return "checkpoint is not quantised" if unquantised else "quantization_config leaves it out"

    def skip_reason(self, tensor: str) -> Skip | str | None:
        """Return why a tensor may be skipped: a bias that adds nothing, one of a KV cache, or as its format says."""
        layer, _, suffix = tensor.rpartition(".")
        if suffix == "bias" and layer in self.outputs and self.stored[tensor].shape == (self.outputs[layer],):
            # AutoGPTQ gives every layer a bias.
            return Skip("a bias of zeros, where the model has none", refuse_other_than_zeros)
        for prefix, decision in self.kv_decisions.items():
            module = f"{prefix.rpartition('.')[0]}."
            if tensor.startswith(module):
                said = skip_kv_tensor(decision.method, tensor.removeprefix(module), module, self.stored)
                if said is not None:
                    return said
        return self.checkpoint_config.skip_reason(tensor)

    def lint(self, unreached: Mapping[str, str] | None = None) -> None:
        """Check the rules once every layer is built.

        unreached: weights that no rule can quantise, and why, by name.
        RuleError for a rule that matches no layer, for one that names such a weight in particular, and for one that
        never applies because others come first.
        """
        self.unreached = dict(unreached or {})
        self._refuse_unreached()
        self._lint(self.rules, self.decisions)
        self._lint(self.kv_rules, self.kv_decisions)

    def swept(self) -> dict[Rule, dict[str, str]]:
        """Return, for each rule, the weights that it is the first to name and cannot quantise, and why."""
        found: dict[Rule, dict[str, str]] = {}
        for name, reason in self.unreached.items():
            rule = next((rule for rule in self.rules if rule.matches(name)), None)
            if rule is not None and not isinstance(self.targets[rule], UnquantizedLinearMethod):
                found.setdefault(rule, {})[name] = reason
        return found

    def _refuse_unreached(self) -> None:
        for rule, weights in self.swept().items():
            reached = any(rule.matches(name) for name in self.decisions)
            if reached and rule.sweeping:
                continue
            lines = [f"{name}: {reason}" for name, reason in weights.items()]
            raise RuleError(
                f"{str(rule)!r} names weights that cannot be quantised: " + first_few(lines, "; "),
                code="rule-unreached",
                found=str(rule),
                fix="Leave them out, by a rule NAME=none before the others, or name them by a pattern that ends in "
                "`**`: what such a one cannot reach is a note of the plan.",
            )

    def _lint(self, rules: tuple[Rule, ...], decisions: Mapping[str, Decision]) -> None:
        names = list(decisions)
        problems = []
        for index, rule in enumerate(rules):
            matched = [name for name in names if rule.matches(*self.spellings(name))]
            if not matched:
                hint = self._hint(rule, names)
                problems.append(f"{str(rule)!r} matches no layer. {hint}".strip())
            # "is", as an equal rule may come first.
            elif not any(decisions[name].rule is rule for name in matched):
                # A rule may decide by another name of the layer, as that of the module that has its tensor.
                spelled = self.spellings(matched[0])
                others = (other for other in rules[:index] if other.matches(*spelled))
                earlier = next(others, decisions[matched[0]].rule)
                problems.append(
                    f"{str(rule)!r} never applies: {str(earlier)!r} comes first for all of its layers."
                )
        if problems:
            raise RuleError(
                "; ".join(problems).rstrip("."),
                code="rule-unmatched" if "matches no layer" in problems[0] else "rule-shadowed",
                fix=f"Layers are named like {names[0]}; see `pymllm plan`."
                if names
                else "No layer of this model takes such a rule.",
            )

    @staticmethod
    def _hint(rule: Rule, names: list[str]) -> str:
        if any(name.startswith(rule.pattern + ".") for name in names):
            return f"A pattern is a whole name: write {rule.pattern + '.**'!r} for everything below it."
        if rule.pattern.startswith("re:"):
            return "A regular expression must match the whole name."
        found = nearest_pattern(rule.pattern, names)
        if found is None:
            return nearest(rule.pattern, names)
        return (
            f"{NEAREST} {found}, which names {counted(sum(_means(found, name) for name in names), 'layer')}."
        )


def nearest_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """Find the pattern most like one that matches no name, and that matches some; None where there is none.

    Each part between dots that no name has becomes the most alike that one has; and what stands before or behind may be
    missing.
    """
    known = sorted(
        {part for name in names for part in name.split(".")}, key=lambda part: (part.isdigit(), part)
    )
    alike: list[list[str]] = []
    for part in pattern.split("."):
        if "*" in part or "?" in part or part in known:
            alike.append([part])
            continue
        close = [part for part in get_close_matches(part.casefold(), known, n=3, cutoff=0.5)]
        alike.append(close or (["*"] if part.isdigit() else [part]))
    for parts in itertools.islice(itertools.product(*alike), 64):
        here = ".".join(parts)
        for found in (here, f"**.{here}", f"{here}.**", f"**.{here}.**"):
            if any(_means(found, name) for name in names):
                return found
    return None
