"""The ids of the tokens that end a text, as a checkpoint's settings name them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError


def end_tokens_of(
    config_file: Path, generation: Mapping[str, Any], config: Mapping[str, Any]
) -> frozenset[int]:
    """Return the ids that end a text: those of generation_config.json, where it has the setting, else of config.json.

    config_file: that of `config`.  An id outside of the vocabulary never comes, which is no harm.  ConfigError for what
    is no id.
    """
    has = "eos_token_id" in generation
    found = (generation if has else config).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ConfigError(
            "the tokens that end a text are not named by their ids",
            code="config-value",
            file=str(config_file.with_name("generation_config.json") if has else config_file),
            tensor="eos_token_id",
            expected="an integer of at least 0, a list of such, or null",
            found=reprlib.repr(found),
            fix="Correct the setting, or take it out: a text then ends at its longest.",
        )
    return frozenset(ends)
