"""Other names of a model's modules: as the checkpoint stores them, and as the class that wrote it has them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable


class ModuleNames:
    """The names that modules have elsewhere.

    A wrapper of images and text calls `model.language_model.layers.0` what the text model calls `model.layers.0`; a
    checkpoint may store it as `language_model.model.layers.0`. Rules, and a config's lists of layers, may use any.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, str]] = (),
        spell: Callable[[str, str], str] = lambda name, guess: guess,
    ) -> None:
        """Learn the names of modules from those of tensors: (in the model, elsewhere), which end alike.

        Where several of the model are one elsewhere (tied ones), the later ones say nothing of their modules.

        spell: says what a tensor that is in none of these would be called elsewhere, by its name and a guess.
        """
        self._spell = spell
        self._owners: dict[str, str] = {}
        self._known: dict[str, dict[str, None]] = {}
        self._tensors: dict[str, str] = {}
        for name, other in tensors:
            self._tensors.setdefault(name, other)
            mine, theirs = name.split("."), other.split(".")
            if self._owners.setdefault(other, name) != name:
                continue
            while len(mine) > 1 and len(theirs) > 1 and mine[-1] == theirs[-1]:
                mine.pop()
                theirs.pop()
                others = self._known.setdefault(".".join(mine), {})
                if mine != theirs:
                    others[".".join(theirs)] = None
        self.of = functools.lru_cache(maxsize=None)(self._of)

    def _of(self, name: str) -> tuple[str, ...]:
        """List all names of a module, its name in the model first; one that is not known has its parent's."""
        head, rest = name, ""
        while head:
            if head in self._known:
                return (name, *(f"{other}{rest}" for other in self._known[head]))
            head, _, last = head.rpartition(".")
            rest = f".{last}{rest}"
        return (name,)

    def tensor(self, name: str) -> str:
        """Return the other name of a tensor: its own, else its module's."""
        return self._tensors.get(name) or self.own(name)

    def owner(self, name: str) -> str:
        """Return the first of the model's tensors that are the same one elsewhere: itself, unless it is tied."""
        return self._owners.get(self._tensors.get(name, ""), name)

    def own(self, name: str) -> str:
        """Return the other name that a tensor would have if it were tied to none."""
        module, _, suffix = name.rpartition(".")
        return f"{self.of(module)[-1]}.{suffix}".removeprefix(".")

    def absent(self, name: str) -> str:
        """Return the other name that a tensor would have, were it there."""
        return self._tensors.get(name) or self._spell(name, self.tensor(name))
