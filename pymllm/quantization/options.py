"""The options of a rule (`pattern=method:key=value,...`), as a format reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pymllm.errors import ConfigError, choices, nearest
from pymllm.quantization.storage.fields import is_group_size
from pymllm.weights.spec import LinearShape


def needs_calibration(method: str, shape: LinearShape) -> ConfigError:
    """Make the error for a method whose activation scales cannot be found from weights alone."""
    return ConfigError(
        f"{method} needs scales for activations, which can only be found from example inputs",
        code="needs-calibration",
        tensor=shape.name,
        fix="Calibrate (`pymllm quantize --calibrate FILE`, quantize_model(calibration=...)), "
        "or choose activations=token.",
    )


def parse_options(
    name: str, options: Mapping[str, str], allowed: Mapping[str, Callable[[str], Any]]
) -> dict[str, Any]:
    """Read a rule's options, each by its converter.  ConfigError for an unknown option or a bad value.

    name: the method's, for messages.  allowed: the converters by option; ValueError from one says what to choose.
    """
    values = {}
    for key, text in options.items():
        if key not in allowed:
            raise ConfigError(
                f"{name} has no option {key!r}",
                code="unknown-option",
                expected=choices(allowed, key) or "no option",
                found=key,
                fix=nearest(key, allowed),
            )
        try:
            values[key] = allowed[key](text)
        except ValueError as error:
            raise ConfigError(
                f"{name}: option {key} cannot be {text!r}", code="bad-option", found=text, fix=str(error)
            ) from None
    return values


def read_group_size(text: str) -> int:
    """Convert an option of `parse_options`: a positive number, or -1 for whole rows."""
    if not is_group_size(int(text)):
        raise ValueError("Choose a positive number, or -1 for whole rows.")
    return int(text)


def one_of(*names: str) -> Callable[[str], str]:
    """Make a converter for `parse_options` that takes one of a few words."""

    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(f"{nearest(text, names)} Choose one of {', '.join(names)}.".lstrip())
        return text

    return convert
