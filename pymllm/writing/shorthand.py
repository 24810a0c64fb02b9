"""A method without a pattern, as a user says it for a whole model: the rules that it stands for.

`int4` is that method for every layer of the model's blocks; embeddings, heads, routers and norms keep their weights.
For a GGUF file there are the names of llama.cpp's mixtures, too: `Q4_K_M` gives each tensor the type that
llama-quantize gives it, as far as it goes by the tensors' places (their sizes, and numbers of experts, do not matter).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pymllm.errors import ConfigError, choices, counted, first_few, nearest
from pymllm.loading.prepare import Prepared
from pymllm.quantization.base import list_target_methods
from pymllm.quantization.formats.gguf import FLOAT_KINDS, GGUFLinearMethod
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.gguf import ROUNDING
from pymllm.quantization.rules import Rule, read_rules
from pymllm.weights.spec import LinearShape

GROUP_SIZES = (64, 32)  # tried in turn where a method's own does not divide the inputs
NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
# Where the inputs are no multiple of 256: llama.cpp's own replacements, but for types that are only read here.
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
HEAD = "Q6_K"  # of heads, and of embeddings that are heads, in files of fewer bits


@dataclass(frozen=True)
class Mixture:
    """A mixture of GGUF's types.

    most: of most layers.  values, down: of v_proj and down_proj where these matter more; first: whether that is so in
    the first layers alone, and not in those at both ends and every third between.
    """

    most: str
    values: str
    down: str
    first: bool = False

    def kind(self, name: str, layer: int, layers: int) -> str:
        """Choose the type of a layer in a block.  layer: the block's number, of `layers`."""
        last = name.rpartition(".")[2]
        if last not in ("v_proj", "down_proj"):
            return self.most
        eighth = layers // 8
        if self.first:
            matters = layer < (4 if last == "v_proj" else eighth)
        else:
            matters = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
        return (self.values if last == "v_proj" else self.down) if matters else self.most


MIXTURES = {
    "Q4_K_S": Mixture("Q4_K", "Q5_K", "Q5_K", first=True),
    "Q4_K_M": Mixture("Q4_K", "Q6_K", "Q6_K"),
    "Q5_K_S": Mixture("Q5_K", "Q5_K", "Q5_K"),
    "Q5_K_M": Mixture("Q5_K", "Q6_K", "Q6_K"),
}
FILE_KINDS = (*MIXTURES, *ROUNDING, *FLOAT_KINDS)


@dataclass(frozen=True)
class Expanded:
    """The rules that a method stands for, the user's own before them, and what to tell the user, in a line."""

    rules: list[str]
    said: str


@dataclass(frozen=True)
class _Weight:
    """A weight that a rule could name.

    block: the number of its block, or None.  stacked: of all experts in one.  floats: whether it is stored so.
    tied: to the embedding.
    """

    name: str
    kind: str
    shape: LinearShape
    block: int | None
    stacked: bool
    floats: bool
    tied: bool


def expand(prepared: Prepared, method: str, rules: list[str], out: Path) -> Expanded:
    """Find the rules for a method without a pattern.

    prepared: the model.  method: "int4:group_size=64" or "Q4_K_M", say.  rules: the user's own, which come first.
    ConfigError for an unknown method, one that `out` cannot hold, or where it is left with no layer.
    """
    name, _, options = method.partition(":")
    own = read_rules(rules)
    weights = [weight for weight in _weights(prepared) if not _named(prepared, own, weight)]
    file = out.suffix.lower() == ".gguf"
    if name.upper() in FILE_KINDS and not options:
        if not file:
            raise ConfigError(
                f"{name} is a name for GGUF files",
                code="spelling",
                file=str(out),
                expected="a path that ends in .gguf",
                fix=f"Write to {out}.gguf, or give a method such as int4.",
            )
        found = _file_rules(name.upper(), weights)
    else:
        targets = list_target_methods()
        known = [*targets, *(FILE_KINDS if file else ())]
        if name not in targets:
            raise ConfigError(
                f"there is no method {name!r} to quantise a model with",
                code="unknown-method",
                expected=choices(known, name),
                found=name,
                fix=nearest(name, known),
            )
        found = _block_rules(Rule.parse(f"**={method}"), weights, file)
    if not found.rules:
        raise ConfigError(
            f"the method {method!r} is left with no layer",
            code="rule-shadowed" if own else "rule-unmatched",
            expected="a layer in a block of the model that no rule names",
            found=first_few([str(rule) for rule in own], "; ") or "a model without blocks of linear layers",
            fix="Leave the method out, or one of the rules."
            if own
            else "Name the layers: --quant PATTERN=METHOD.",
        )
    return Expanded([*rules, *found.rules], found.said + (f"; first {first_few(rules, '; ')}" if own else ""))


def _weights(prepared: Prepared) -> Iterator[_Weight]:
    for unit in prepared.units:
        tied = unit.holder.borrows_from is not None
        block = prepared.model.block_of(unit.name)
        number = None if block is None else int(block.rpartition(".")[2])
        for part in unit.holder.parts():
            floats = isinstance(part.method.source_method(), UnquantizedLinearMethod)
            yield _Weight(part.name, part.kind, part.shape, number, part.stacked, floats, tied)


def _named(prepared: Prepared, rules: tuple[Rule, ...], weight: _Weight) -> bool:
    names = prepared.quant.spellings(weight.name)
    vague = weight.kind == "router"
    return any(rule.matches(*names) and not (vague and rule.sweeping) for rule in rules)


def _block_rules(asked: Rule, weights: list[_Weight], file: bool) -> Expanded:
    """Make the rules for one method in every block."""
    inside = [w for w in weights if w.block is not None and w.kind in ("linear", "experts")]
    kept = [w for w in inside if w.stacked and w.floats and not file and asked.method != "mxfp4"]
    changed = [w for w in inside if w not in kept]
    if not changed:
        return Expanded([], "")
    fitting = _fitting(asked, changed)
    method = str(fitting).removeprefix("**=")
    prefixes = list(dict.fromkeys(_above(weight.name) for weight in changed))
    rules = [f"{pattern}=none" for pattern in dict.fromkeys(_pattern(w.name) for w in kept)]
    rules += [f"{prefix}={method}" for prefix in prefixes]
    if not file and asked.method != "mlx":
        # Other folders have no quantised embeddings; a head that is tied to one follows it.
        tables = [w for w in weights if (w.kind == "embedding" or w.tied) and not w.floats]
        rules += [f"{weight.name}=none" for weight in tables]
    stay = [w.name for w in weights if w.block is None and w.kind != "router" and not w.tied]
    stay += list(dict.fromkeys(_pattern(w.name) for w in kept))
    said = f"{method} for {counted(len(changed), 'layer')} ({first_few(prefixes)})"
    if fitting != asked:
        said += ", in smaller groups as the inputs are no multiple of its own"
    return Expanded(rules, f"{said}; as they are: {first_few([*stay, 'norms'])}")


def _above(name: str) -> str:
    """Make the pattern of everything in blocks like that of this layer: "model.layers.**"."""
    found = NUMBER.search(name)
    return name if found is None else f"{name[: found.start()]}.**"


def _pattern(name: str) -> str:
    """Make the pattern of a layer and its like in other blocks: "model.layers.*.mlp.up_proj"."""
    return NUMBER.sub(".*", name)


def _fitting(asked: Rule, weights: list[_Weight]) -> Rule:
    """Return the rule, in smaller groups where its own, which nobody asked for, fit some layer not."""
    tried = [asked]
    if "group_size" not in dict(asked.options):
        tried += [
            Rule(asked.pattern, asked.method, (*asked.options, ("group_size", str(size))))
            for size in GROUP_SIZES
        ]
    for rule in tried:
        try:
            target = rule.build()
        except ConfigError:
            if rule is asked:
                raise
            continue  # a method without groups
        if all(_fits(target, weight) for weight in weights):
            return rule
    return asked


def _fits(target: LinearMethodBase, weight: _Weight) -> bool:
    try:
        target.check(weight.shape)
    except ConfigError:
        return False
    return True


def _file_rules(name: str, weights: list[_Weight]) -> Expanded:
    """Make the rules for a GGUF file of one type, or a mixture of them."""
    chosen = {weight.name: _kind(name, weight, weights) for weight in weights if weight.kind != "router"}
    alike: dict[str, list[str]] = {}
    for weight in chosen:
        alike.setdefault(_pattern(weight), []).append(weight)
    single, common = [], []
    for pattern, names in alike.items():
        usual = Counter(chosen[one] for one in names).most_common(1)[0][0]
        single += [f"{one}=gguf:type={chosen[one]}" for one in names if chosen[one] != usual]
        common.append(f"{pattern}=gguf:type={usual}")
    counts = Counter(chosen[weight.name] for weight in weights if weight.name in chosen and not weight.tied)
    said = ", ".join(f"{counted(count, 'tensor')} {kind}" for kind, count in counts.most_common())
    wide = [weight for weight in weights if weight.name in chosen and weight.shape.in_features % 256]
    if "_K" in name and wide:
        said += " (other types where the inputs are no multiple of 256)"
    return Expanded([*single, *common], f"{name}: {said}; norms and routers stay floats")


def _kind(name: str, weight: _Weight, weights: list[_Weight]) -> str:
    """Choose a weight's type in the file `name`: that of its place, or one instead that its inputs fit."""
    heads = [other for other in weights if other.kind == "lm_head" and not other.tied]
    last = weight.kind == "lm_head" or (weight.kind == "embedding" and not heads)
    mixture = MIXTURES.get(name)
    kind = name if mixture is None else mixture.most
    if weight.block is not None and mixture is not None:
        blocks = 1 + max(other.block for other in weights if other.block is not None)
        kind = mixture.kind(weight.name, weight.block, blocks)
    elif last and _small(kind):
        kind = HEAD
    for one in (kind, INSTEAD.get(kind, "Q8_0")):
        if one in FLOAT_KINDS or _fits(GGUFLinearMethod(one), weight):
            return one
    return "F16"


def _small(kind: str) -> bool:
    """Tell whether a type has fewer bits than a head should have."""
    return kind.startswith("Q") and int(kind[1]) < 6
