"""Every public name explains every argument in its docstring: "name: meaning", or "one, other: their meaning"."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import pymllm
from pymllm.loading.options import LoadOptions

NAMES = [name for name in pymllm.__all__ if callable(getattr(pymllm, name))]
# A list of names before a colon, where a line, a sentence or a parenthesis begins.
EXPLAINED = re.compile(r"(?:^|(?<=  )|(?<=\())(\w+(?:,\s+\w+)*):(?=\s)", re.MULTILINE)
# What the first sentence of a class is about, or what belongs to every error.
IN_PROSE = {"Parallel": {"rank", "size"}, "PymllmError": {"message"}}


def arguments_of(function: Callable[..., Any]) -> list[str]:
    """List the arguments of a function or class; **options are those of `LoadOptions`."""
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        found += LoadOptions.__annotations__ if parameter.kind is parameter.VAR_KEYWORD else [name]
    return found


def explained_in(text: str) -> set[str]:
    """Find the names that a docstring explains."""
    return {name for names in EXPLAINED.findall(text) for name in re.split(r",\s+", names)}


def unexplained(function: Callable[..., Any]) -> list[str]:
    explained = explained_in(inspect.getdoc(function) or "")
    return [name for name in arguments_of(function) if name not in explained]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_public_name_is_explained(name):
    value = getattr(pymllm, name)
    in_prose = IN_PROSE.get(name, set())
    assert set(unexplained(value)) <= in_prose
    assert all(f"`{argument}`" in value.__doc__ for argument in in_prose)


def test_every_option_of_loading_is_explained_where_it_is_defined():
    assert explained_in(inspect.getdoc(LoadOptions)) >= set(LoadOptions.__annotations__)


def test_there_are_names_to_test_and_options_among_their_arguments():
    assert {"LLM", "load_model", "plan", "verify", "compare", "swap", "quantize_checkpoint"} < set(NAMES)
    assert {"path", "device", "kv_cache", "revision"} < set(arguments_of(pymllm.plan))


def test_an_argument_that_only_prose_speaks_of_is_not_explained():
    def function(path, tokens, window, *, text=None, again=False, **options):
        """Do something with the text: whatever `again` says, and device: too.

        path: a folder.  tokens,
        window: how many, in how many.
        """

    assert unexplained(function) == ["text", "again", *LoadOptions.__annotations__]
