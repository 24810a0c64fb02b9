"""Regular expressions of a checkpoint, an adapter or a user, matched within a bounded number of steps.

`re` goes back and tries again, and a hostile pattern makes it try for ever (`.?` sixty times over). Here a pattern is
matched by sets of positions: what can follow a position p of the text is worked out once for all p together, from the
pattern's end to its start, and a set is one integer. A character is an `&` and a shift, alternatives are an `|`, and
`.*` is one addition. Lookaheads and lookbehinds are sets, too. The answer is that of `re`, whose own parser reads the
pattern, for all that the answer can depend on: which of several ways matches first does not matter for yes or no.

What does depend on that (backreferences, conditions, atomic groups) is left to `re` where it cannot take long, and
refused elsewhere; so are the simplest patterns, for which `re` is faster.

    step        one operation on a set; of a text of more than 1,000 characters, so many more
    choice      where `re` may try another way: a repeat of a variable count, or alternatives
"""

# A set of positions of a text of n characters: bit j is for position n - j, so that going back one character is << 1.

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pymllm.errors import PymllmError

if sys.version_info >= (3, 11):
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_parse

MAX_LENGTH = 1000  # characters of a pattern
MAX_DEPTH = 40  # of groups within groups
MAX_RANGE = 1024  # characters in a range that ignores case: `re` goes through them one by one
FREE_STEPS = 256  # of one match, beside two for each part of the pattern: more than what people write needs
MAX_FURTHER = 500_000  # steps beyond those, of one pattern over all texts: well below a second
MAX_TEXT = 4096  # characters of a text
MAX_STEPS = 1_000_000_000  # of all patterns within one `bounded_steps`: a minute or two
SIMPLE_LENGTH = 200  # characters of a text that `re` may be given

Yes: TypeAlias = Literal[True] | None
EXPECTED = f"a regular expression of at most {MAX_LENGTH} characters that takes few steps to match"
ANYWHERE, AT_END = -1, 1  # where a match may end
Refuse: TypeAlias = Callable[[str], PymllmError]
Step: TypeAlias = Callable[["_Text", int], int]


class PatternProblem(Exception):
    """The reason why a pattern cannot be matched."""


# The steps that all patterns together may still take, in a list of one number.
_allowance: ContextVar[list[int] | None] = ContextVar("pattern_steps", default=None)


@contextmanager
def bounded_steps(steps: int = MAX_STEPS) -> Iterator[None]:
    """Bound the steps of all patterns within this block together; a block within another one shares its allowance."""
    token = _allowance.set(_allowance.get() or [steps])
    try:
        yield
    finally:
        _allowance.reset(token)


class Pattern:
    """A compiled pattern.  Its methods answer True or None, as those of `re` answer a match or None.

    refuse: makes the error to raise, of a problem in words, for a pattern that is none, or that takes too many steps.
    """

    def __init__(self, pattern: str, refuse: Refuse) -> None:
        self.pattern, self.refuse = pattern, refuse
        self.further = 0  # steps beyond the free ones
        try:
            self.program = _compile(pattern)
        except PatternProblem as problem:
            raise refuse(str(problem)) from None

    def match(self, text: str) -> Yes:
        """Tell whether the pattern matches from the text's start on."""
        # A last repeat that may be empty is never tried again.
        if (simple := self._simple(text, self.program.choices - self.program.open_ended <= 1)) is not None:
            return self._answer(simple.match(text) is not None)
        return self._answer(self._run(text, ANYWHERE) >> len(text) & 1)

    def fullmatch(self, text: str) -> Yes:
        """Tell whether the pattern matches the whole text."""
        if (simple := self._simple(text, self.program.choices <= 1)) is not None:
            return self._answer(simple.fullmatch(text) is not None)
        return self._answer(self._run(text, AT_END) >> len(text) & 1)

    def search(self, text: str) -> Yes:
        """Tell whether the pattern matches anywhere in the text."""
        if (simple := self._simple(text, self.program.choices == 0)) is not None:
            return self._answer(simple.search(text) is not None)
        return self._answer(self._run(text, ANYWHERE))

    def _simple(self, text: str, few_choices: bool) -> re.Pattern[str] | None:
        """Return what `re` makes of the pattern if it cannot take long to match this text, or None."""
        # What `re` alone can match has been refused where there are more choices.
        if len(text) > SIMPLE_LENGTH or not (few_choices or self.program.ordered):
            return None
        self._take(8)
        return self.program.simple

    @staticmethod
    def _answer(found: int) -> Yes:
        return True if found else None

    def _run(self, text: str, ends: int) -> int:
        """Return the positions from which the pattern can match.  ends: where it may end."""
        program = self.program
        if program.back is None:
            raise self.refuse(f"one with {program.ordered}, for a name of {len(text)} characters")
        if len(text) > MAX_TEXT:
            raise self.refuse(f"to be matched with a name of {len(text)} characters")
        weight = 1 + len(text) // 1000
        free = FREE_STEPS + 2 * program.size
        within = _Text(text, free + (MAX_FURTHER - self.further) // weight)
        try:
            positions = program.back(within, within.all if ends == ANYWHERE else ends)
        except PatternProblem as problem:
            self.further = MAX_FURTHER
            raise self.refuse(str(problem)) from None
        taken = within.limit - within.left
        if taken > free:
            self.further += (taken - free) * weight
        self._take((taken + program.size + 32) * weight)
        return positions

    def _take(self, steps: int) -> None:
        allowance = _allowance.get()
        if allowance is not None:
            allowance[0] -= steps
            if allowance[0] < 0:
                raise self.refuse("one of so many, for so many names, that matching them would take minutes")


@dataclass(frozen=True)
class _Program:
    """A pattern that was read.

    back: None: the answer depends on the order of its choices, by what is in `ordered`.  size: its parts.
    choices: how many.  open_ended: whether it ends in a repeat that may be empty.  simple: what `re` makes of it; None:
    a repeat holds more than one character, and it may take long.
    """

    back: Step | None
    size: int
    choices: int
    open_ended: bool
    simple: re.Pattern[str] | None
    ordered: str


@functools.lru_cache(maxsize=65536)
def _compile(pattern: str) -> _Program:
    """Read a pattern.  PatternProblem for one that is none, or that is more than may be read."""
    if len(pattern) > MAX_LENGTH:
        raise PatternProblem(f"longer than {MAX_LENGTH} characters")
    try:
        tree: Any = sre_parse.parse(pattern)
        builder = _Builder()
        back = builder.sequence(tree, tree.state.flags, 0)
        # Compiled in any case: a lookbehind of no fixed width is an error that only this finds.
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise PatternProblem(f"no regular expression ({error})") from None
    open_ended = len(tree) > 0 and str(tree[-1][0]) in REPEATS and tree[-1][1][0] == 0
    if builder.ordered and (builder.choices > 1 or builder.loops):
        raise PatternProblem(f"one with {builder.ordered} and more than one repeat or alternative")
    return _Program(
        None if builder.ordered else back,
        builder.size,
        builder.choices,
        open_ended,
        None if builder.loops else compiled,
        builder.ordered,
    )


class _Text:
    """A text while one pattern is matched.

    all: every position.  places: for each character, the positions after it.  left: the steps that loops may take.
    """

    def __init__(self, text: str, limit: int) -> None:
        self.text, self.length = text, len(text)
        self.all = (2 << self.length) - 1
        self.places = _places(text)
        self.limit = self.left = limit

    def take(self, steps: int) -> None:
        """Count steps of a loop.  PatternProblem if they are more than the pattern may take."""
        self.left -= steps
        if self.left < 0:
            raise PatternProblem("one that takes too many steps to match")

    def after(self, members: _Members) -> int:
        """Return the positions after the characters that are among the members."""
        found = 0
        if members.listed is None:
            for character, places in self.places.items():
                if members[character]:
                    found |= places
            return found
        for character in members.listed:
            found |= self.places.get(character, 0)
        return self.all >> 1 & ~found if members.negated else found


@functools.lru_cache(maxsize=1024)
def _places(text: str) -> dict[str, int]:
    places: dict[str, int] = {}
    bit = 1
    for character in reversed(text):
        places[character] = places.get(character, 0) | bit
        bit <<= 1
    return places


class _Members(dict[str, bool]):
    """The characters that a part of a pattern stands for: what `re` says of each that is asked for.

    listed: all of them, or all that it does not stand for, if `negated`; None: they are not few.
    """

    def __init__(self, source: str, flags: int, listed: tuple[str, ...] | None, negated: bool) -> None:
        super().__init__()
        self.compiled = re.compile(source, flags)
        self.listed, self.negated = listed, negated

    def __missing__(self, character: str) -> bool:
        self[character] = found = self.compiled.match(character) is not None
        return found


class _Builder:
    """The steps of a parsed pattern, and what is counted on the way."""

    def __init__(self) -> None:
        self.size = self.choices = self.repeats = 0
        self.loops = False  # whether a repeat holds more than one character
        self.ordered = ""

    def sequence(self, tree: Any, flags: int, depth: int) -> Step:
        """Make the step that goes back over everything in `tree`, which is of one position after another."""
        if depth > MAX_DEPTH:
            raise PatternProblem(f"more than {MAX_DEPTH} groups deep")
        steps: list[Step] = []
        run: list[str] = []  # characters that follow one another, from the last one on
        for op, value in reversed(list(tree)):
            self.size += 1
            if str(op) == "LITERAL" and not flags & re.IGNORECASE:
                run.append(chr(value))
                continue
            if run:
                steps.append(_characters(tuple(run)))
                run = []
            steps.append(self._part(str(op), op, value, flags, depth))
        if run:
            steps.append(_characters(tuple(run)))
        return steps[0] if len(steps) == 1 else _in_turn(tuple(steps))

    def _part(self, kind: str, op: Any, value: Any, flags: int, depth: int) -> Step:
        if kind in SINGLE:
            return _one_of(_members(kind, value, flags))
        if kind == "AT":
            return _at(str(value), flags)
        if kind == "SUBPATTERN":
            _, added, removed, body = value
            return self.sequence(body, _flags(flags, added, removed), depth + 1)
        if kind == "BRANCH":
            self.choices += 1
            return _either(tuple(self.sequence(item, flags, depth + 1) for item in value[1]))
        if kind in REPEATS:
            return self._repeat(value, flags, depth)
        if kind in ("ASSERT", "ASSERT_NOT"):
            return self._look(kind == "ASSERT", value, flags, depth)
        if kind == "FAILURE":  # (?!)
            return lambda text, ends: 0
        if kind not in ORDERED:
            raise PatternProblem(f"one with {kind}, which is not known here")
        self.ordered = ORDERED[kind]
        if kind == "POSSESSIVE_REPEAT":
            self._repeat(value, flags, depth)
        elif kind == "ATOMIC_GROUP":
            self.sequence(value, flags, depth + 1)
        elif kind == "GROUPREF_EXISTS":
            self.choices += 1
            for body in filter(None, value[1:]):
                self.sequence(body, flags, depth + 1)
        return lambda text, ends: ends

    def _repeat(self, value: Any, flags: int, depth: int) -> Step:
        least, most, body = value
        most = None if most == sre_parse.MAXREPEAT else int(most)
        self.choices += least != most
        self.repeats += 1
        single = len(body) == 1 and str(body[0][0]) in SINGLE
        self.loops |= not single and most != 1
        if single:
            self.size += 1
            return _run_of(_members(str(body[0][0]), body[0][1], flags), int(least), most)
        before = self.size
        step = self.sequence(body, flags, depth + 1)
        return _repeated(step, int(least), most, self.size - before + 1)

    def _look(self, wanted: bool, value: Any, flags: int, depth: int) -> Step:
        """Make the step of what must, or must not, be ahead or behind."""
        direction, body = value
        least, most = body.getwidth()
        if direction < 0 and least != most:
            raise PatternProblem("no regular expression (a lookbehind needs a fixed width)")
        outside, self.choices, repeats = self.choices, 0, self.repeats
        step = self.sequence(body, flags, depth + 1)
        # What was found ahead is not sought otherwise: a few alternatives are then no more than a longer pattern.
        once = self.choices == 1 and self.repeats == repeats
        self.choices = outside + (0 if once else self.choices)
        width = int(least) if direction < 0 else 0
        if wanted:
            return lambda text, ends: ends & (step(text, text.all) >> width)
        return lambda text, ends: ends & ~(step(text, text.all) >> width)


REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
SINGLE = ("LITERAL", "NOT_LITERAL", "IN", "ANY")
ORDERED = {
    "GROUPREF": "a reference to a group",
    "GROUPREF_EXISTS": "a condition",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}
CATEGORIES = {
    f"CATEGORY_{negated}{name}": f"\\{letter.upper() if negated else letter}"
    for name, letter in (("DIGIT", "d"), ("SPACE", "s"), ("WORD", "w"))
    for negated in ("", "NOT_")
}
TYPES = re.ASCII | re.LOCALE | re.UNICODE


def _flags(flags: int, added: int, removed: int) -> int:
    """Combine the flags around a group with its own, as `re` does."""
    return ((flags & ~TYPES if added & TYPES else flags) | added) & ~removed


def _members(kind: str, value: Any, flags: int) -> _Members:
    """Return the characters that match a part of one character, which is spelt for `re` anew."""
    flags = int(flags) & int(re.IGNORECASE | re.ASCII | re.DOTALL)
    if kind == "ANY":
        return _members_of(".", flags, () if flags & re.DOTALL else ("\n",), True)
    items = value if kind == "IN" else [("LITERAL", value)]
    negated = kind == "NOT_LITERAL"
    source, listed, few = "", [], not flags & re.IGNORECASE
    for op, item in items:
        if str(op) == "NEGATE":
            negated = True
        elif str(op) == "LITERAL":
            source += _spelt(item)
            listed.append(chr(item))
        elif str(op) == "RANGE":
            low, high = item
            if flags & re.IGNORECASE and high - low > MAX_RANGE:
                raise PatternProblem(f"one that ignores case in a range of {high - low} characters")
            source += f"{_spelt(low)}-{_spelt(high)}"
            few = False
        else:
            source += CATEGORIES[str(item)]
            few = False
    return _members_of(f"[{'^' * negated}{source}]", flags, tuple(listed) if few else None, negated)


@functools.lru_cache(maxsize=4096)
def _members_of(
    source: str, flags: int, listed: tuple[str, ...] | None = None, negated: bool = False
) -> _Members:
    return _Members(source, flags, listed, negated)


def _spelt(character: int) -> str:
    return f"\\U{character:08x}"


def _characters(run: tuple[str, ...]) -> Step:
    def back(text: _Text, ends: int) -> int:
        places = text.places
        for character in run:
            ends = (ends & places.get(character, 0)) << 1
            if not ends:
                return 0
        return ends

    return back


def _one_of(members: _Members) -> Step:
    return lambda text, ends: (ends & text.after(members)) << 1


def _in_turn(steps: tuple[Step, ...]) -> Step:
    def back(text: _Text, ends: int) -> int:
        for step in steps:
            if not ends:
                return 0
            ends = step(text, ends)
        return ends

    return back


def _either(steps: tuple[Step, ...]) -> Step:
    def back(text: _Text, ends: int) -> int:
        found = 0
        for step in steps:
            found |= step(text, ends)
        return found

    return back


def _run_of(members: _Members, least: int, most: int | None) -> Step:
    """Make the step over so many characters, all of them among the members.  most: None: any number."""

    def back(text: _Text, ends: int) -> int:
        after = text.after(members)
        for _ in range(least):
            if not ends:
                return 0
            text.take(1)
            ends = (ends & after) << 1
        if most is None or most - least >= text.length:
            # The carry of the sum runs through each run of members: all positions before those of `ends` at once.
            return (((ends & after) + after) ^ after) | ends
        found = ends
        for _ in range(most - least):
            text.take(1)
            ends = (ends & after) << 1
            if not ends:
                break
            found |= ends
        return found

    return back


def _repeated(step: Step, least: int, most: int | None, size: int) -> Step:
    """Make the step that takes `step`, of so many parts, between `least` and `most` times; None: any number."""

    def back(text: _Text, ends: int) -> int:
        for _ in range(least):
            before, ends = ends, step(text, ends)
            text.take(size)
            if ends == before:  # so will it be each further time
                break
        found = new = ends
        times = 0
        while new and times != (None if most is None else most - least):
            text.take(size)
            new = step(text, new) & ~found
            found |= new
            times += 1
        return found

    return back


# \\B does not match an empty text before Python 3.14.
OF_EMPTY = re.match(r"\B", "") is not None


def _at(where: str, flags: int) -> Step:
    """Make the step that keeps the positions at a start, an end, or an edge of a word."""
    words = _members_of(r"\w", int(flags & re.ASCII))

    def positions(text: _Text) -> int:
        start, lines = 1 << text.length, text.places.get("\n", 0)
        if where == "AT_BEGINNING" and flags & re.MULTILINE:
            return start | lines
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return start
        if where == "AT_END" and flags & re.MULTILINE:
            return 1 | lines << 1
        if where == "AT_END":
            return 1 | (lines & 1) << 1
        if where == "AT_END_STRING":
            return 1
        if not text.length:
            return int(where == "AT_NON_BOUNDARY" and OF_EMPTY)
        after = text.after(words)
        edges = after ^ after << 1
        return edges if where == "AT_BOUNDARY" else text.all & ~edges

    return lambda text, ends: ends & positions(text)
