"""A `quantization_config` that knows which of its settings were read, so that none is ignored.

A format reads a `Settings` as it would read a dict. What it neither reads nor declares harmless is refused when its
`from_config` returns (`refusing_unread`, which `QuantizationConfig` puts around every format's): an unknown setting may
change what the codes mean, and weights that are read wrongly look like any others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pymllm.errors import ConfigError, choices, first_few, nearest

QUANT_METHOD = "quant_method"  # names the format; who reads it has chosen the format by it
ROOT = "quantization_config"


@dataclass(frozen=True)
class Harmless:
    """A setting that may be left unread.  reason: why.  only: the values for which that is so; None: any."""

    reason: str
    only: tuple[Any, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Tell whether the setting may be left unread with this value."""
        return self.only is None or any(value == known and type(value) is type(known) for known in self.only)


HarmlessSettings = Mapping[str, Harmless]


def harmless(reason: str, *paths: str, only: Sequence[Any] | None = None) -> dict[str, Harmless]:
    """Make the entries of settings that may be left unread.

    paths: below the config, such as `meta.mse`, with spaces between them; `*` stands for one name, or one place in a
    list.  All that is below an object of such a path may be left unread, too, unless `only` is given.
    only: the values for which that holds, beside empty ones.
    """
    return {path: Harmless(reason, None if only is None else tuple(only)) for path in " ".join(paths).split()}


def below(paths: str, *settings: HarmlessSettings) -> dict[str, Harmless]:
    """Give entries another place: below each of the paths, which have spaces between them."""
    return {
        f"{path}.{name}": entry
        for path in paths.split()
        for table in settings
        for name, entry in table.items()
    }


class Settings(Mapping[str, Any]):
    """An object of a config, read like a dict; it remembers what was asked for.

    Objects in it, and in lists in it, are `Settings`, too.  It cannot be copied into a dict, as every setting of a copy
    would count as read: `with_defaults` is for that.
    file: where it stands.  root: what the paths of its settings begin with there; "": the file's own object.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        file: str = "config.json",
        root: str = ROOT,
        path: tuple[str, ...] = (),
    ) -> None:
        self.file, self.root, self.path = file, root, path
        self.reading = False  # whether a format's from_config is at it
        self._names: dict[str, None] = {}  # what was asked for, in this order
        self._values = {name: self._wrap(value, (*path, name)) for name, value in values.items()}

    def _wrap(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            return Settings(value, file=self.file, root=self.root, path=path)
        if isinstance(value, (list, tuple)):
            return [self._wrap(item, (*path, f"[{index}]")) for index, item in enumerate(value)]
        return value

    def __getitem__(self, name: str) -> Any:
        self._names[name] = None
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether there is such a setting.  To ask is not to read it."""
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> NoReturn:
        """Refuse to be copied, as `{**settings}` and `dict(settings)` do.  TypeError, always."""
        raise TypeError("a copy of Settings would count every setting as read; use with_defaults(name=value)")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Settings):
            return self._values == other._values
        return isinstance(other, Mapping) and self._values == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._values)

    def with_defaults(self, **values: Any) -> Settings:
        """Return the settings with these values for absent ones.  What is read of it counts as read of both."""
        filled = Settings({}, file=self.file, root=self.root, path=self.path)
        filled._values, filled._names = {**values, **self._values}, self._names
        return filled

    def was_read(self, name: str) -> bool:
        """Tell whether a format has asked for a setting, be it there or not."""
        return name in self._names

    def plain(self) -> dict[str, Any]:
        """Return a copy of which nothing counts as read."""
        return dict(self._values)

    def place(self, path: Sequence[str]) -> str:
        """Spell the path of a setting as people write it: `quantization_config.config_groups.group_0.weights`."""
        text = self.root
        for part in path:
            text += part if part.startswith("[") or not text else f".{part}"
        return text

    def refuse_unread(self, format: str, known: HarmlessSettings) -> None:
        """Raise ConfigError for every setting that was not read, is not empty and is not known to be harmless.

        format: the format's name, for the message.  known: by path, see `harmless`.
        """
        unread = list(self._unread([_Node.make(known)]))
        if not unread:
            return
        within, name, value, entry, harmless_here = unread[0]
        others = [f"{self.place((*at.path, other))} {brief(what)}" for at, other, what, *_ in unread[1:]]
        more = f", and likewise {first_few(others)}" if others else ""
        if entry is not None:
            raise ConfigError(
                f"{format} with {self.place((*within.path, name))} {brief(value)} cannot be read{more}",
                code="quantization-config",
                file=self.file,
                tensor=self.place((*within.path, name)),
                expected=f"{' or '.join(map(repr, entry.only or ())) or 'null'}: {entry.reason}",
                found=brief(value),
                fix="Write the checkpoint again without it.",
            )
        here = list(dict.fromkeys([*within._names, *harmless_here]))
        raise ConfigError(
            f"the setting {self.place((*within.path, name))} is not known to {format}, and may change what the weights "
            f"mean{more}",
            code="unknown-setting",
            file=self.file,
            tensor=self.place((*within.path, name)),
            expected=f"{choices(sorted(within._names), name) or 'no settings'}, which are read here",
            found=brief(value),
            fix=f"{nearest(name, here)} Write the checkpoint again without it; if its writer says that it does not "
            "matter to whoever reads the weights, take it out of the file.".lstrip(),
        )

    def _unread(self, nodes: list[_Node]) -> Iterator[_Unread]:
        """Yield each setting that may not stay unread.  nodes: what is declared at this object's path."""
        for name, value in self._values.items():
            if name == QUANT_METHOD and not self.path:
                continue
            found = [node for at in nodes for part in (name, "*") if (node := at.below.get(part)) is not None]
            entry = next((node.entry for node in found if node.entry is not None), None)
            about_values = entry is None or entry.only is not None
            known_below = about_values and any(node.below for node in found)
            if name in self._names or (known_below and _has_objects_alone(value)):
                yield from _unread_within(value, found)
            elif not _is_empty(value) and not (entry is not None and entry.allows(value)):
                yield self, name, value, entry, [part for at in nodes for part in at.below if part != "*"]


# The object that a setting is in, its name, its value, its entry, and the names that are harmless in that object.
_Unread = tuple[Settings, str, Any, Harmless | None, list[str]]


def _unread_within(value: Any, nodes: list[_Node]) -> Iterator[_Unread]:
    """Yield what may not stay unread in an object, or in those of a list."""
    if isinstance(value, Settings):
        yield from value._unread(nodes)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            parts = (f"[{index}]", "*")
            below = [node for at in nodes for part in parts if (node := at.below.get(part)) is not None]
            yield from _unread_within(item, below)


@dataclass
class _Node:
    """A tree of declared settings, by the parts of their paths.  entry: that of the path that ends here."""

    below: dict[str, _Node] = field(default_factory=dict)
    entry: Harmless | None = None

    @classmethod
    def make(cls, settings: HarmlessSettings) -> _Node:
        root = cls()
        for path, entry in settings.items():
            node = root
            for part in path.split("."):
                node = node.below.setdefault(part, cls())
            node.entry = entry
        return root


def refusing_unread(read: Callable[[Any, Any], Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Make of a format's `from_config` one that refuses the settings which it leaves unread."""

    @functools.wraps(read)
    def from_config(cls: Any, config: Mapping[str, Any]) -> Any:
        settings = config if isinstance(config, Settings) else Settings(config)
        if settings.reading:  # a subclass asks its base class to read a part
            return read(cls, settings)
        settings.reading = True
        try:
            found = read(cls, settings)
        finally:
            settings.reading = False
        settings.refuse_unread(cls.get_name(), cls.harmless)
        return found

    return from_config


def _has_objects_alone(value: Any) -> bool:
    """Tell whether a value is an object, or a list of nothing else."""
    return isinstance(value, Settings) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Settings) for item in value)
    )


def _is_empty(value: Any) -> bool:
    """Tell whether a value says nothing: null, or a text, list or object without content."""
    return value is None or (isinstance(value, (str, list, Settings)) and not value)


def brief(value: Any) -> str:
    """Show a value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
