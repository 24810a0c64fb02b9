"""What the settings of a `quantization_config` are by their names, whichever format has them.

Formats share these names, and no library writes a number of bits as 8.0 or a switch as "False". A format's own reader
says which of the values it can read; here a value of another kind is refused, at any depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pymllm.errors import ConfigError, PymllmError
from pymllm.quantization.storage.settings import Settings, brief

LARGEST = 1 << 31  # more bits, or values in a group, than any weight has


def _is_integer(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def _is_size(value: Any) -> bool:
    """Tell whether a value is a number of values in a group, or the numbers of rows and columns of a block."""
    sides = value if isinstance(value, list) else [value]
    return len(sides) in (1, 2) and all(_is_integer(side) for side in sides)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


Kind = tuple[Callable[[Any], bool], str]
INTEGER: Kind = (_is_integer, "an integer")
SIZE: Kind = (_is_size, "an integer, or a list of two")
SWITCH: Kind = (_is_switch, "true or false")
WORD: Kind = (_is_word, "a name")

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("bits", "w_bit", "num_bits", "nbits", "act_bits", "ch_axis", "axis"), INTEGER),
    **dict.fromkeys(("group_size", "q_group_size", "act_group_size"), SIZE),
    **dict.fromkeys(("sym", "symmetric", "zero_point", "desc_act", "has_zero_point"), SWITCH),
    **dict.fromkeys(("is_dynamic", "act_sym", "is_marlin_format"), SWITCH),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"), SWITCH),
    **dict.fromkeys(("quant_method", "checkpoint_format", "packing_format", "data_type"), WORD),
    **dict.fromkeys(("act_data_type", "quant_algo", "kv_cache_quant_algo", "strategy", "type"), WORD),
    **dict.fromkeys(("qscheme", "mode", "pack_dtype", "activation_scheme", "format"), WORD),
    **dict.fromkeys(("weight_scale_semantics", "bnb_4bit_quant_type"), WORD),
}


def check_kinds(settings: Settings) -> None:
    """Raise ConfigError for a setting, at any depth, that is not of its name's kind.  null is as good as none."""
    for name, value in settings.plain().items():  # of which nothing counts as read
        accepts, expected = KINDS.get(name, (None, ""))
        # torchao's objects of Python, {"_type": ..., "_data": ...}, are no values of these kinds.
        typed = isinstance(value, Settings) and "_type" in value
        if accepts is not None and value is not None and not typed and not accepts(value):
            raise ConfigError(
                f"the setting {name} has a value of another kind",
                code="quantization-config",
                file=settings.file,
                tensor=settings.place((*settings.path, name)),
                expected=expected,
                found=brief(value),
                fix="Write the checkpoint again, or correct the setting if you know what was meant.",
            )
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Settings):
                check_kinds(inner)


def checking_kinds(read: Callable[[Any, Any], Any]) -> Callable[[Any, Settings], Any]:
    """Make of a format's `from_config` one that checks the kinds of all settings, too.

    What the format itself says of a value is said in its place; what else it trips over has a value of another kind.
    """

    @functools.wraps(read)
    def from_config(cls: Any, config: Settings) -> Any:
        try:
            found = read(cls, config)
        except PymllmError:
            raise
        except Exception:
            check_kinds(config)
            raise
        check_kinds(config)
        return found

    return from_config
