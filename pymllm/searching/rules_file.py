"""Rules for a choice of methods: few, and no two of them for one layer, so that their order does not matter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pymllm.searching.methods import STORED

NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
WIDTH = 116  # of a comment line


def write_rules(methods: Mapping[str, str]) -> list[str]:
    """Write rules that give each layer its method, and match no other layer.

    methods: by the layers' names; a layer that is "stored" needs no rule.  Returns lines "PATTERN=METHOD".
    """
    rules = []
    by_tail: dict[str, dict[str, str]] = {}  # by a name with stars: the method of each layer number
    for name, method in methods.items():
        found = NUMBER.search(name)
        if found is not None:
            tail = f"{name[: found.start()]}*{name[found.end() :]}"
            by_tail.setdefault(EXPERT.sub("*", tail), {})[found[0]] = method
        elif method != STORED:
            rules.append(f"{name}={method}")
    # What has the same methods in the same layers, as the parts of a fused layer do, shares its rules.
    alike: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for tail, by_number in by_tail.items():
        alike.setdefault(tuple(by_number.items()), []).append(tail)
    for pairs, tails in alike.items():
        numbers: dict[str, list[str]] = {}
        for number, method in pairs:
            numbers.setdefault(method, []).append(number)
        for method, several in numbers.items():
            if method == STORED:
                continue
            globs = [tail for tail in tails if len(numbers) == 1 and _is_alone(tail, methods)]
            others = _patterns([tail for tail in tails if tail not in globs], several)
            rules += [f"{pattern}={method}" for pattern in (*globs, *others)]
    return rules


def _is_alone(tail: str, methods: Mapping[str, str]) -> bool:
    """Tell whether the glob `tail` matches nothing but names with a layer's number in the place of its star."""
    glob = re.compile(re.escape(tail).replace(r"\*", "[^.]*"))
    return all(NUMBER.search(name) for name in methods if glob.fullmatch(name))


def _patterns(tails: Iterable[str], numbers: list[str]) -> list[str]:
    """Write one regular expression for each stem of the tails: `re:model\\.layers\\.(0|3)\\.mlp\\.(gate|up)_proj`."""
    by_stem: dict[str, list[str]] = {}
    for tail in tails:
        stem, _, last = tail.rpartition(".")
        by_stem.setdefault(stem, []).append(last)
    found = []
    for stem, lasts in by_stem.items():
        before = re.escape(f"{stem}.").replace(r"\*", _either(numbers), 1).replace(r"\*", r"\d+")
        found.append(f"re:{before}{_either(map(re.escape, lasts))}")
    return found


def _either(words: Iterable[str]) -> str:
    several = list(words)
    return several[0] if len(several) == 1 else f"({'|'.join(several)})"


def comment(*lines: str) -> list[str]:
    """Write lines as comments of a rules file."""
    return [f"# {line}".rstrip()[:WIDTH] if line else "#" for line in lines]
