"""Modules of a model that are alike: a deep model repeats a few, and what is found out about one holds for the others.

Two modules are alike if they have the same classes, shapes, settings and functions all the way down. Their place in
the list that holds them may differ, as long as nothing computes with it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.layers.held import WeightHolder

PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, enum.Enum)
OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "_is_hf_initialized"}


Setting = tuple[str, str]  # a module's name, and one of its attributes


def likeness(module: nn.Module, places: Collection[Setting] = ()) -> Hashable:
    """Return a value that is equal for modules that are alike.  places: the settings that are its place in a list."""
    found: list[Hashable] = []
    inside: set[nn.Module] = set()
    for name, child in module.named_modules():
        if child in inside:
            continue
        if isinstance(child, WeightHolder):
            inside.update(child.modules())
            found.append((name, type(child), child.likeness(), vars(child).get("forward")))
            continue
        held = [(key, tuple(p.shape), p.dtype) for key, p in child._parameters.items() if p is not None]
        for key, buffer in child._buffers.items():
            if buffer is not None:
                held.append((key, tuple(buffer.shape), buffer.dtype))
        settings = {key: value for key, value in vars(child).items() if key not in OWN}
        settings = {key: value for key, value in settings.items() if (name, key) not in places}
        found.append((name, type(child), tuple(held), _freeze(settings)))
    return tuple(found)


def _places_of(children: Iterable[nn.Module]) -> set[Setting]:
    """Find the settings of a list's modules that are their places in it."""
    agree: dict[Setting, list[bool]] = {}
    for index, child in enumerate(children):
        for name, module in child.named_modules():
            for key, value in vars(module).items():
                if type(value) is int:
                    agree.setdefault((name, key), []).append(value == index)
    return {setting for setting, each in agree.items() if len(each) > 1 and all(each)}


def _freeze(value: Any) -> Hashable:
    """Return a hashable value: equal for equal settings; what is no plain setting is equal to itself alone."""
    if isinstance(value, (*PLAIN, torch.Size)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_freeze(one) for one in value)
    if isinstance(value, Mapping):
        return tuple((str(key), _freeze(one)) for key, one in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(_freeze(one) for one in value)
    if isinstance(value, StandIn):
        return value
    return "itself", id(value)


class StandIn:
    """A function in the place of a forward that is equal to others of its key."""

    def __init__(self, key: Hashable, run: Callable[..., Any]) -> None:
        self.key, self.run = key, run

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.run(*args, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class _Place:
    """A module's place in its list, as the module has it.  used: whether anything was computed with it."""

    def __init__(self, index: int) -> None:
        self.index, self.used = index, False

    def __str__(self) -> str:
        return str(self.index)

    __repr__ = __str__


def _watched(name: str) -> Callable[..., Any]:
    def run(self: _Place, *args: Any) -> Any:
        self.used = True
        return getattr(self.index, name)(*args)

    return run


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod"):
    setattr(_Place, f"__{_name}__", _watched(f"__{_name}__"))
for _name in ("floordiv", "rfloordiv", "truediv", "rtruediv", "pow", "rpow"):
    setattr(_Place, f"__{_name}__", _watched(f"__{_name}__"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "index", "neg", "divmod"):
    setattr(_Place, f"__{_name}__", _watched(f"__{_name}__"))


@contextmanager
def repeated_once(model: nn.Module) -> Iterator[dict[str, str]]:
    """Run one of several modules of a list that are alike, where they are called alike, for the time of a `with` block.

    The others give what that one gave.  Yields the names of those that were not run, each with that of the other one.
    """
    names: dict[str, str] = {}
    changed: list[tuple[dict[str, Any], str, Any]] = []  # attributes to put back: of which, name, value
    for path, children in _lists(model):
        firsts: dict[Hashable, _First] = {}
        places = _places_of(children) if len(children) > 1 else set()
        for index, child in enumerate(children):
            if "forward" in vars(child):
                continue
            key = likeness(child, places)
            name = f"{path}.{index}" if path else str(index)
            forward = child.forward
            if key in firsts:
                run: Any = functools.partial(_follow, firsts[key], forward, name, names)
            else:
                firsts[key] = first = _First(name, index)
                for below, attribute in places:
                    attributes = _attributes(child, below)
                    if attribute in attributes:
                        changed.append((attributes, attribute, index))
                        attributes[attribute] = first.place
                run = functools.partial(_lead, first, forward)
            vars(child)["forward"] = run
            changed.append((vars(child), "forward", None))
    try:
        yield names
    finally:
        for attributes, name, value in changed:
            if name == "forward":
                del attributes[name]
            else:
                attributes[name] = value


def _attributes(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the attributes of the module of this name below `module`; none where there is no such module."""
    try:
        return vars(module.get_submodule(name))
    except AttributeError:
        return {}


class _First:
    """The module that runs in the place of those that are alike.  answers: by what it was called with."""

    def __init__(self, name: str, index: int) -> None:
        self.name, self.place = name, _Place(index)
        self.answers: dict[Hashable, Any] = {}


def _lead(first: _First, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    answer = forward(*args, **options)
    first.answers[_call(args, options)] = answer
    return answer


def _follow(
    first: _First, forward: Callable[..., Any], name: str, names: dict[str, str], *args: Any, **options: Any
) -> Any:
    key = _call(args, options)
    if first.place.used or key not in first.answers:
        return forward(*args, **options)
    names[name] = first.name
    return first.answers[key]


def _call(args: Any, options: Mapping[str, Any]) -> Hashable:
    """Return a value that is equal for calls that are alike: tensors count by their shapes."""

    def freeze(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        if isinstance(value, (list, tuple)):
            return tuple(map(freeze, value))
        if isinstance(value, Mapping):
            return tuple((key, freeze(one)) for key, one in value.items())
        return value if _says_equal(value) else _freeze(value)

    return freeze(args), freeze(options)


def _says_equal(value: Any) -> bool:
    """Tell whether a value has an equality of its own, and can be hashed by it."""
    own: Any = type(value).__hash__
    return own is not None and own is not object.__hash__ and not isinstance(value, nn.Module)


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of modules that lie in no other list, with their names."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{name}.") for name in outer):
            outer.append(path)
            yield path, module
