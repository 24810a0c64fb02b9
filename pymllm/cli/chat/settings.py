"""The settings of a chat that change as it goes: how answers are sampled, and what is done with thoughts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymllm.cli.sampling_options import SAMPLING
from pymllm.errors import ConfigError, RequestError, unknown_name
from pymllm.text.dialect import SWITCHES, Dialect

THINKING = ("on", "off", "hide", "default")
WHOLE = ("max_tokens", "top_k", "seed")
# What a setting is given to have no value of its own.
DEFAULT = "default"


@dataclass
class Settings:
    """The settings.

    sampling: fields of SamplingParams that are not as the checkpoint recommends.  thinking: one of `THINKING`.
    stats: whether a line about each answer follows it.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    thinking: str = DEFAULT
    stats: bool = False

    def variables(self, dialect: Dialect) -> dict[str, bool]:
        """Return the variables of the chat template that these settings decide."""
        switch = thinking_switch(dialect)
        return {} if switch is None or self.thinking not in ("on", "off") else {switch: self.thinking == "on"}

    @property
    def shows_thoughts(self) -> bool:
        return self.thinking != "hide"


def thinking_switch(dialect: Dialect) -> str | None:
    """Return the variable by which the chat template turns thoughts on and off; None: it has none."""
    return next((name for name in SWITCHES if name in dialect.variables), None)


def check_thinking(mode: str, dialect: Dialect) -> str | None:
    """Check a mode of thinking against what the template can.  Returns what is to be said of it, or None.

    ConfigError for a wish that the template cannot fulfil.
    """
    if mode not in THINKING:
        raise unknown_name("mode of thinking", mode, THINKING, code="thinking")
    thinks = dialect.thoughts is not None or dialect.writes_messages
    if mode == "default" or thinking_switch(dialect) is not None:
        return None
    if mode == "hide":
        return None if thinks else "This model's chat template knows no thoughts: there is nothing to hide."
    if thinks and mode == "on":
        return "This model's chat template has no switch for thoughts: the model thinks when it thinks."
    if not thinks and mode == "off":
        return "This model's chat template knows no thoughts: there is nothing to turn off."
    raise ConfigError(
        "this model's chat template has no switch for thoughts",
        code="thinking",
        expected=f"a template that reads {' or '.join(SWITCHES)}",
        fix="With `hide` they are not shown."
        if thinks
        else "Choose another model, or another --chat-template.",
    )


def changed(sampling: Mapping[str, Any], name: str, value: str) -> dict[str, Any]:
    """Return sampling settings with one of them read from a text; "default" takes it out.

    ConfigError for an unknown name, RequestError for what is no number; ranges are checked by SamplingParams.
    """
    name = name.replace("-", "_")
    if name not in SAMPLING:
        raise unknown_name("setting", name, SAMPLING, code="setting")
    rest = {key: kept for key, kept in sampling.items() if key != name}
    if value == DEFAULT:
        return rest
    if name == "stop":
        return rest | {name: [value]}
    kind = int if name in WHOLE else float
    try:
        return rest | {name: kind(value)}
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise RequestError(
            f"{name} cannot be {value!r}",
            code="setting",
            tensor=name,
            expected=f"{expected}, or {DEFAULT}",
            found=value,
        ) from None
