"""Reading a `quantization_config`: the error for a value that is not supported, and lists of modules left alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError


def unsupported(
    what: str,
    field: str,
    value: Any,
    supported: str,
    *,
    file: str = "config.json",
    within: str = "quantization_config.",
) -> ConfigError:
    """The error for `field` of a config with a `value` that cannot be read.

    what: the format's name for people.  supported: what is.  within: the path of the object that holds `field`.
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
    """The value of `field`, which must be one of a few; `default` where the field is absent."""
    value = config.get(field, default)
    known = list(choices)
    if not any(value == choice and type(value) is type(choice) for choice in known):
        raise unsupported(what, field, value, " or ".join(map(str, known)))
    return value


def is_skipped(prefix: str, patterns: Iterable[str]) -> bool:
    """Whether a module is one that transformers leaves unconverted.

    A pattern is a regular expression from the name's start to a segment's end, or the name's own end.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        re.match(rf"(?:{pattern}){boundary}", prefix) or prefix.endswith(pattern) for pattern in patterns
    )


def read_stored(tensor: Any) -> Tensor:
    """The data of a small tensor of the checkpoint, on the CPU, for what a config leaves to tensors."""
    with torch.device("cpu"):  # a model may be being built on the meta device
        data = tensor if isinstance(tensor, Tensor) else tensor.read()
    assert isinstance(data, Tensor)
    return data


def read_names(config: Mapping[str, Any], field: str, *, regex: str | None = None) -> tuple[str, ...]:
    """A list of names or patterns in a `quantization_config`; null: none.  ConfigError for anything else.

    regex: what stands before a regular expression, which must then be one; "": all are.
    """
    names = config.get(field)
    if names is None:
        return ()
    problem = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem, names = "a list of names", [names]
    for name in names:
        if problem is None and regex is not None and name.startswith(regex):
            try:
                re.compile(name.removeprefix(regex))
            except re.error as error:
                problem, names = f"regular expressions ({error})", [name]
    if problem is not None:
        raise ConfigError(
            f"{field} of the quantisation must hold {problem}",
            code="quantization-config",
            file="config.json",
            tensor=f"quantization_config.{field}",
            expected="a list of strings, or null",
            found=repr(names[0]),
        )
    return tuple(names)
