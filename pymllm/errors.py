"""Every error that pymllm raises on purpose.

Each error says what is wrong (its message and `code`), where (`file`, `tensor`), what was expected, what was found and
what to do (`fix`).  The command line prints `str(error)`, one paragraph, without a traceback.

Names and values in it may come from a hostile file: whatever does not print is shown `escaped`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

DISTRIBUTION = "pymllm-dispatch"  # what the package index calls this package
NEAREST = "Nearest:"
BRIEF = 8  # items of a long list that a terminal is shown
LONGEST_LIST = 260  # characters of an "a or b or c" that an error holds whole
LISTED = "\n  "  # before each item of a list in a message


class PymllmError(Exception):
    """The base of all errors raised on purpose.

    code: a stable short name, e.g. "truncated".  file, tensor, expected, found, fix: optional parts of the text.
    brief: a shorter message for a terminal, where `message` is long; `str(error)` has all of `message`.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        file: str | None = None,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
        brief: str | None = None,
    ) -> None:
        self.message, self.code, self.file, self.tensor = message, code, file, tensor
        self.expected, self.found, self.fix = expected, found, fix
        self.brief = None if brief == message else brief
        super().__init__(str(self))

    def __str__(self) -> str:
        return self._paragraph(self.message)

    def shortened(self) -> str:
        """Return the error's text with `brief` in place of the message, where there is one."""
        return self._paragraph(self.brief or self.message)

    def _paragraph(self, message: str) -> str:
        # A list in the message has its items on lines of their own; a line break that is not one of these is foreign.
        return LISTED.join(escaped(line) for line in self._text(message).split(LISTED))

    def _text(self, message: str) -> str:
        where = ", ".join(str(part) for part in (self.file, self.tensor) if part and not _says(message, part))
        text = f"{where}: {message}" if where else message
        text = text.rstrip(".")
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.found is not None:
            text += f"{', ' if self.expected is not None else '; '}found {self.found}"
        text += "." if not text.endswith((".", "?", "!")) else ""
        return f"{text} {self.fix}" if self.fix else text


class CheckpointError(PymllmError, ValueError):
    """A checkpoint that cannot be loaded exactly as it is."""


class ConfigError(PymllmError, ValueError):
    """A setting, a model config or a quantisation config that we cannot honour."""


class IndicesError(ConfigError, IndexError):
    """Numbers of rows, experts, pages, slots or tokens outside of what they name."""


class RuleError(ConfigError):
    """A quantisation rule that matches nothing, can never apply, or cannot be read."""


class ShardingError(ConfigError):
    """A layer that cannot be divided over this many tensor-parallel ranks."""


class KernelError(PymllmError, RuntimeError):
    """A problem that no kernel can run, or that the forced kernel cannot."""


class RankError(PymllmError, RuntimeError):
    """A rank that is gone, or that did not come to a collective in time."""


class RequestError(PymllmError, ValueError):
    """A generation request whose parameters are out of range.  `tensor` holds the parameter's name."""

    @property
    def param(self) -> str | None:
        return self.tensor


class ArgumentError(ConfigError, RequestError, TypeError):
    """A call with an argument that the function does not have, or one of the wrong type."""


class MissingExtraError(PymllmError, ImportError):
    """An optional package that is needed and not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            code="missing-extra",
            fix=f"Install it with: {install_command(extra)}.",
        )


@functools.cache
def install_command(extra: str) -> str:
    """Return the command that installs what an extra brings, by the names that the package index knows.

    The packages themselves are named, so that it holds wherever pymllm was installed from.
    """
    return " ".join(["pip install", *(f"'{needed}'" for needed in sorted(_brought_by(extra)))])


def _brought_by(extra: str) -> set[str]:
    """Collect the requirements of an extra and of the extras that it names; without metadata, the extra itself."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return {f"{DISTRIBUTION}[{extra}]"}
    brought: set[str] = set()
    for one in needed:
        marker = one.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        one.marker = None
        brought |= set().union(*map(_brought_by, one.extras)) if one.name == DISTRIBUTION else {str(one)}
    return brought or {f"{DISTRIBUTION}[{extra}]"}


def escaped(text: str, keep: str = "") -> str:
    """Write a foreign text for a terminal, a table or a log: "\\x1b", "\\u202e" for each character that does not print.

    Such are control characters, line breaks, marks that turn the direction of writing, invisible ones, halves of
    surrogate pairs.  keep: those of them that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def _says(message: str, name: str) -> bool:
    """Tell whether a message names a file or tensor: the whole name, and not as a hint at another one."""
    statement = message.partition(NEAREST)[0]
    return re.search(rf"(?<![\w.-]){re.escape(str(name))}(?![\w-]|\.\w)", statement) is not None


def first_few(items: Sequence[str], separator: str = ", ", count: int = BRIEF) -> str:
    """Join the first items, and how many there are besides, for `brief`."""
    more = len(items) - count
    return separator.join([*items[:count], f"and {more} more"] if more > 0 else items)


def counted(count: int, one: str, more: str = "") -> str:
    """Write a number and what it counts: "1 layer", "2 layers".  more: the plural, where it is not `one` and an s."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Make a hint such as "Nearest: a, b." that names the candidates most like `name`; "" where none is like it.

    Small and capital letters count as the same.
    """
    spelled: dict[str, list[str]] = {}
    for candidate in candidates:
        spelled.setdefault(candidate.casefold(), []).append(candidate)
    alike = difflib.get_close_matches(name.casefold(), list(spelled), n=count, cutoff=0.6)
    close = [candidate for key in alike for candidate in dict.fromkeys(spelled[key])][:count]
    return f"{NEAREST} {', '.join(close)}." if close else ""


def choices(known: Iterable[str], name: object = "") -> str:
    """Write what may be chosen, "a or b or c"; a long list has those most like `name` first, and may end early."""
    names = list(dict.fromkeys(known))
    if len(names) > BRIEF:
        like = str(name).casefold()
        names.sort(key=lambda one: -difflib.SequenceMatcher(None, like, one.casefold()).ratio())
    text = " or ".join(names)
    return text if len(text) <= LONGEST_LIST else first_few(names, " or ").replace("or and ", "or ")


def unknown_name(
    what: str, name: str, known: Iterable[str], *, code: str, error: type[PymllmError] = ConfigError
) -> PymllmError:
    """Make the error for a name that is none of the known ones.  what: what it should name, as "linear kernel"."""
    known = list(known)
    return error(
        f"there is no {what} {name!r}",
        code=code,
        expected=choices(known, name),
        found=name,
        fix=nearest(name, known),
    )


def fetch_factory_name(factory: Any) -> str:
    """Return the name of a registered factory, "module.qualified.name", without its partials and decorators.

    factory: a class or a function; anything else goes by its class.
    """
    while True:
        if isinstance(factory, (functools.partial, functools.partialmethod)):
            factory = factory.func
        elif hasattr(factory, "__wrapped__"):
            factory = factory.__wrapped__
        elif inspect.ismethod(factory):
            factory = factory.__func__
        else:
            break
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}.{named.__qualname__}"
