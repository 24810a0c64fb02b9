"""Reading a `quantization_config`: the error for a value that is not supported, lists of names, and patterns."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_parse


def unsupported(
    what: str,
    field: str,
    value: Any,
    supported: str,
    *,
    file: str = "config.json",
    within: str = "quantization_config.",
) -> ConfigError:
    """Make the error for `field` of a config with a `value` that cannot be read.

    what: the format's name for people.  supported: what can be read.  within: the path of the object around `field`,
    with its dot.
    """
    return ConfigError(
        f"{what} with {field} {value!r} cannot be read",
        code="quantization-config",
        file=file,
        tensor=f"{within}{field}",
        expected=supported,
        found=repr(value),
    )


def read_choice(
    what: str, config: Mapping[str, Any], field: str, default: Any, choices: Iterable[Any]
) -> Any:
    """Read `field`, whose value must be one of a few; `default` where the field is absent.  ConfigError for another."""
    value = config.get(field, default)
    known = list(choices)
    if not any(value == choice and type(value) is type(choice) for choice in known):
        raise unsupported(what, field, value, " or ".join(map(str, known)))
    return value


def is_group_size(value: Any) -> bool:
    """Tell whether a value is a positive integer, or -1, which means whole rows."""
    return type(value) is int and (value > 0 or value == -1)


def is_from_auto_round(config: Mapping[str, Any]) -> bool:
    """Tell whether AutoRound wrote the checkpoint: the scales of its symmetric integers have the sign of the peak."""
    return "autoround_version" in config or config.get("provider") == "auto-round"


def is_block(value: Any) -> bool:
    """Tell whether a value is a list of two positive integers: the outputs and inputs that share a scale."""
    return isinstance(value, list) and [type(side) is int and side > 0 for side in value] == [True, True]


def is_skipped(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Tell whether transformers would leave a module unconverted: whether one of the patterns is for one of its names.

    A pattern is a regular expression that matches from the name's start to a segment's end, or it is the name's end.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        name.endswith(pattern)
        or compile_pattern(f"(?:{pattern}){boundary}", "modules_to_not_convert").match(name)
        for pattern in patterns
        for name in names
    )


MAX_PATTERN = 1000  # characters
MAX_REPEATS = 5  # long ones; matching takes about as many steps as the name's length to this power
LONG = 16  # a repeat of more times than this is long


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str, field: str, prefix: str = "") -> re.Pattern[str]:
    """Compile a regular expression of a checkpoint's config, which may be hostile.

    field: what holds it.  prefix: what stands before it there, such as "re:".  ConfigError for what is no regular
    expression, or could take forever to match: it is too long, has too many repeats, or repeats what repeats itself or
    has alternatives.
    """
    problem = None
    if len(pattern) > MAX_PATTERN:
        problem = f"longer than {MAX_PATTERN} characters"
    else:
        try:
            compiled = re.compile(pattern)
            problem = _too_slow(sre_parse.parse(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"no regular expression ({error})"
    if problem is None:
        return compiled
    raise ConfigError(
        f"a pattern in {field} of the quantisation is {problem}",
        code="quantization-config",
        file="config.json",
        tensor=f"quantization_config.{field}",
        expected=f"a regular expression of at most {MAX_PATTERN} characters and {MAX_REPEATS} repeats, not nested",
        found=repr((prefix + pattern)[:200]),
    )


def _too_slow(tree: Any) -> str | None:
    """Return why matching could take time without bound, or None if it cannot.  tree: the parsed expression."""
    repeats = 0
    pending: list[tuple[Any, bool]] = [(tree, False)]  # nodes, and whether a repeat is around them
    while pending:
        node, repeated = pending.pop()
        if isinstance(node, sre_parse.SubPattern):
            pending += [(item, repeated) for item in node.data]
        elif isinstance(node, tuple) and node and str(node[0]) in REPEATS:
            _, (_, most, body) = node
            if repeated:
                return "a repeat within a repeat"
            repeats += most > LONG
            pending.append((body, most > 1))
        elif isinstance(node, tuple) and node and str(node[0]) == "BRANCH" and repeated:
            return "a repeat of alternatives"
        elif isinstance(node, (tuple, list)):
            pending += [
                (item, repeated) for item in node if isinstance(item, (tuple, list, sre_parse.SubPattern))
            ]
    return f"one of {repeats} repeats" if repeats > MAX_REPEATS else None


REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def read_stored(tensor: Any) -> Tensor:
    """Read a small tensor of the checkpoint on the CPU, for settings that a format keeps in tensors."""
    with torch.device("cpu"):  # the caller may be building a model on the meta device
        data = tensor if isinstance(tensor, Tensor) else tensor.read()
    assert isinstance(data, Tensor)
    return data


def refuse_other_than_zeros(stored: Tensor) -> str | None:
    """Return how many values of a tensor are not zero, or None if all are zero.  For a `Skip`."""
    other = int((stored.float() != 0).sum())
    return f"{other} of {stored.numel()} values that are not 0" if other else None


def read_names(config: Mapping[str, Any], field: str, *, regex: str | None = None) -> tuple[str, ...]:
    """Read a list of names or patterns; null: an empty one.  ConfigError for anything else.

    regex: what stands before a regular expression, to have these checked; "": every entry is one; None: none is.
    """
    names = config.get(field)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{field} of the quantisation must hold a list of names",
            code="quantization-config",
            file="config.json",
            tensor=f"quantization_config.{field}",
            expected="a list of strings, or null",
            found=repr(names),
        )
    for name in names:
        if regex is not None and name.startswith(regex):
            compile_pattern(name.removeprefix(regex), field, regex)
    return tuple(names)
