"""Reading a `quantization_config`: the error for a value that is not supported, lists of names, and patterns."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError, counted
from pymllm.patterns import EXPECTED, Pattern


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


@functools.lru_cache(maxsize=65536)
def compile_pattern(pattern: str, field: str, prefix: str = "") -> Pattern:
    """Compile a regular expression of a checkpoint's config, which may be hostile.

    field: what holds it.  prefix: what stands before it there, such as "re:".  ConfigError for what is no regular
    expression, here, or when it is matched for what would take forever.
    """
    found = repr((prefix + pattern)[:200])
    return Pattern(pattern, functools.partial(_pattern_error, f"{field} of the quantisation", field, found))


@functools.lru_cache(maxsize=65536)
def compile_wildcards(pattern: str, field: str) -> Pattern:
    """Compile a name with shell wildcards, as fnmatch has them; `fullmatch` then matches as `fnmatchcase` does."""
    refuse = functools.partial(_pattern_error, f"{field} of the quantisation", field, repr(pattern[:200]))
    return Pattern(translate_wildcards(pattern), refuse)


def is_regular_expression(text: str) -> bool:
    """Tell whether a text is a regular expression that can be matched."""
    try:
        compile_pattern(text, "")
    except ConfigError:
        return False
    return True


def _pattern_error(where: str, field: str, found: str, problem: str) -> ConfigError:
    return ConfigError(
        f"a pattern in {where} is {problem}",
        code="quantization-config",
        file="config.json",
        tensor=f"quantization_config.{field}",
        expected=EXPECTED,
        found=found,
    )


def translate_wildcards(pattern: str) -> str:
    """Return the regular expression for the names that `fnmatch` takes: with `*`, `?`, `[...]`, `[!...]`."""
    parts: list[str] = []
    start = 0
    while start < len(pattern):
        sign, end = pattern[start], start + 1
        if sign == "[":  # what closes it is not its first character, nor the one after a "!"
            first = end + pattern.startswith("!", end)
            closed = pattern.find("]", first + 1)
            end = end if closed < 0 else closed + 1
        if sign == "*":
            parts += [] if parts and parts[-1] == ".*" else [".*"]
        elif sign == "?":
            parts.append(".")
        elif end == start + 1:
            parts.append(re.escape(sign))
        else:  # fnmatch's own reading of it, without the (?s: and )\Z around it
            parts.append(fnmatch.translate(pattern[start:end])[4:].rpartition(")")[0])
        start = end
    return f"(?s:{''.join(parts)})"


def read_stored(tensor: Any) -> Tensor:
    """Read a small tensor of the checkpoint on the CPU, for settings that a format keeps in tensors."""
    with torch.device("cpu"):  # the caller may be building a model on the meta device
        data = tensor if isinstance(tensor, Tensor) else tensor.read()
    assert isinstance(data, Tensor)
    return data


def refuse_other_than_zeros(stored: Tensor) -> str | None:
    """Return how many values of a tensor are not zero, or None if all are zero.  For a `Skip`."""
    other = int((stored.float() != 0).sum())
    return f"{other} of {counted(stored.numel(), 'value')} that are not 0" if other else None


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
