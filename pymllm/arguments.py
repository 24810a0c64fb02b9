"""Calls with wrong arguments, as errors that say which arguments there are: `checked`."""

from __future__ import annotations

import functools
import inspect
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pymllm.errors import ArgumentError, nearest

F = TypeVar("F", bound=Callable[..., Any])

# An annotation of these alone, or of int, is checked; others have checks of their own, with ranges.
_KINDS: dict[str, type] = {
    "bool": bool,
    "str": str,
    "Path": os.PathLike,
    "Mapping": Mapping,
    "None": type(None),
}
_SAID = {
    bool: "True or False",
    int: "a whole number",
    str: "text",
    os.PathLike: "a path",
    Mapping: "a dict",
    type(None): "None",
}


def checked(also: Mapping[str, type] | None = None, *, kinds: bool = True) -> Callable[[F], F]:
    """Make a decorator: a call with a name that the function does not have is an ArgumentError, with the nearest name.

    kinds: whether a value, too, that is no bool, text, path, dict or whole number where the annotation says just that.
    also: classes by the name of the argument that takes one; whoever names a field of it is told so.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if named:
                _check(function, named, also or {}, kinds)
            return function(*arguments, **named)

        return call  # type: ignore[return-value]

    return decorate


def _check(
    function: Callable[..., Any], named: Mapping[str, Any], also: Mapping[str, type], of_kinds: bool
) -> None:
    kinds, open_ended = _kinds_of(function)
    what = function.__qualname__.removesuffix(".__init__")
    for name, value in named.items():
        if name not in kinds:
            home = _find_home(name, also)
            if open_ended and not home:
                continue
            raise ArgumentError(
                f"{what} has no argument {name!r}",
                code="argument-unknown",
                fix=home or nearest(name, kinds) or f"It takes {', '.join(kinds)}.",
            )
        allowed = kinds[name] if of_kinds else ()
        wrong = allowed and not isinstance(value, allowed)
        if wrong or (allowed == (int,) and isinstance(value, bool)):
            raise ArgumentError(
                f"{name} of {what} is of the wrong kind",
                code="argument-type",
                expected=" or ".join(said for kind, said in _SAID.items() if kind in allowed),
                found=reprlib.repr(value),
            )


def _find_home(name: str, also: Mapping[str, type]) -> str:
    """Say which argument takes an object that has a field of this name."""
    for argument, home in also.items():
        if name in inspect.signature(home).parameters:
            return f"It is one of {home.__name__}: {argument}={home.__name__}({name}=...)."
    return ""


@functools.cache
def _kinds_of(function: Callable[..., Any]) -> tuple[dict[str, tuple[type, ...]], bool]:
    """Return what each argument may be by its annotation; () where anything may.  True with it for further names."""
    kinds: dict[str, tuple[type, ...]] = {}
    open_ended = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = _options_of(str(parameter.annotation), inspect.unwrap(function).__globals__)
            kinds.update(options)
            open_ended = not options
        elif name != "self" and parameter.kind is not parameter.VAR_POSITIONAL:
            kinds[name] = _allowed(str(parameter.annotation))
    return kinds, open_ended


def _options_of(annotation: str, spaces: Mapping[str, Any]) -> dict[str, tuple[type, ...]]:
    """Return the kinds of the fields of Unpack[SomeDict]; {} for any other annotation."""
    name = annotation.removeprefix("Unpack[").removesuffix("]")
    if name == annotation or name not in spaces:
        return {}
    fields = spaces[name].__annotations__
    return {field: _allowed(getattr(kind, "__forward_arg__", str(kind))) for field, kind in fields.items()}


def _allowed(annotation: str) -> tuple[type, ...]:
    """Return the classes of an annotation such as "str | Path | None"; () if it has others than those of _KINDS."""
    while annotation != (shorter := re.sub(r"\[[^\[\]]*\]", "", annotation)):
        annotation = shorter
    if annotation == "int":
        return (int,)
    parts = annotation.split(" | ")
    return tuple(_KINDS[part] for part in parts) if set(parts) <= set(_KINDS) else ()
