"""Every setting of every format with values of all kinds: it is read as before, or refused by one error of ours."""

from __future__ import annotations

import copy

import pytest

from pymllm.errors import ConfigError, PymllmError
from pymllm.quantization.base import get_quantization_config

from .published_configs import CONFIGS

VALUES = (None, True, -1, 8.0, float("nan"), 10**30, "", "\x1b[2J", [], {}, [["a"]], {"x": []})


def places(value, path=()):
    """Every place in a config, with its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(config, path, value):
    """A copy with another value at one place; what is beside it is shared."""
    if not path:
        return value
    made = copy.copy(config)
    made[path[0]] = changed(made[path[0]], path[1:], value)
    return made


def read(config):
    name = str(config.get("quant_method")).lower().replace("_", "-")
    return get_quantization_config(name).from_config(config)


def once_each():
    """Each setting of a format by its names once, from the first config that has it."""
    seen = set()
    for config in CONFIGS.values():
        for path in places(config):
            known = (config["quant_method"], *(key for key in path if isinstance(key, str)))
            if known not in seen and path[0] != "meta":  # notes of a writer
                seen.add(known)
                yield config, path


def test_no_value_of_any_setting_of_any_format_gives_more_than_an_error_of_our_own():
    tried, foreign = 0, []
    for config, path in once_each():
        for value in VALUES:
            tried += 1
            try:
                read(changed(config, path, value))
            except PymllmError as error:
                assert str(error).isprintable(), path
            except Exception as error:
                foreign.append((path, value, error))
    assert tried > 3000 and not foreign


@pytest.mark.parametrize("value", (8.0, 4.0, True, "4", [4], 2**40), ids=repr)
@pytest.mark.parametrize("name", ("bits", "w_bit", "num_bits", "nbits", "group_size"))
def test_a_whole_number_is_an_integer_in_every_format(name, value):
    for config, path in once_each():
        if path[-1] == name and not (name == "group_size" and isinstance(value, list)):
            with pytest.raises(ConfigError):
                read(changed(config, path, value))


@pytest.mark.parametrize("value", (1, "True", "false", [], 0.0), ids=repr)
@pytest.mark.parametrize("name", ("sym", "symmetric", "zero_point", "desc_act", "is_dynamic", "load_in_4bit"))
def test_a_switch_is_true_or_false_in_every_format(name, value):
    for config, path in once_each():
        if path[-1] == name and path[0] != "quant_config":
            with pytest.raises(ConfigError):
                read(changed(config, path, value))
