"""Tables for people: as wide as the terminal, folded between words and at the dots of names, never within a number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymllm.errors import escaped

if TYPE_CHECKING:
    from rich.console import Console

GAP = "  "
INDENT = "    "
# Where a text may be folded: after spaces, dots, commas, slashes, ... unless a digit follows, as in 1.5 or 6e-3.
PLACES = re.compile(r"(?<=[ ,;:=/+×])(?=[^ ,;:=/+>×])|(?<=[.-])(?=[^\d .>-])|(?<= )(?=\d)")


@dataclass(frozen=True)
class Column:
    """A column.  numeric: to the right, and in one piece.  name: with little room, on a line of its own."""

    title: str
    numeric: bool = False
    name: bool = False


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Write a table, the titles and a rule above it.

    Where `width` does not hold it, the `name` stands on a line of its own and cells are folded; where that is not
    enough, every row is a block of lines.
    """
    cells = [[escaped(cell) for cell in row] for row in rows]
    whole = [column.title for column in columns]
    wide = _widths(columns, [whole, *cells], width, fold=False)
    if wide is not None:
        return _laid_out(columns, cells, wide)
    place = next((index for index, column in enumerate(columns) if column.name), None)
    if place is not None:
        short = [*columns[:place], *columns[place + 1 :]]
        left = [[*row[:place], *row[place + 1 :]] for row in cells]
        widths = _widths(short, [[column.title for column in short], *left], width)
        if widths is not None:
            indent = " " * (widths[0] + len(GAP)) if short[0].numeric else INDENT
            below = [[indent + line for line in fold(row[place], width - len(indent))] for row in cells]
            return _laid_out(short, left, widths, below, after=short[0].numeric)
    widths = _widths(columns, [whole, *cells], width)
    if widths is not None:
        return _laid_out(columns, cells, widths)
    return [line for row in cells for line in _block(columns, row, width)]


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], out: Console) -> None:
    """Print a table as wide as the console at most, with plain signs where it shows no others."""
    for line in table_lines(columns, rows, out.width):
        shown = line.replace("─", "-") if out.options.ascii_only else line
        out.print(shown, no_wrap=True, overflow="ignore", crop=False)


def fold(text: str, width: int) -> list[str]:
    """Fold a text into lines of at most `width`: between words, or after a dot or the like; a longer piece is cut."""
    lines, line = [], ""
    for piece in PLACES.split(text):
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return [*lines, line.rstrip()]


def _widths(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int, *, fold: bool = True
) -> list[int] | None:
    """Find the widths of columns; None where they do not fit.  fold: whether cells may take several lines."""
    room = width - len(GAP) * (len(columns) - 1)
    texts = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in texts]
    if not fold:
        return widths if sum(widths) <= room else None
    least = [
        width
        if column.numeric
        else max(len(piece.rstrip()) for cell in cells for piece in PLACES.split(cell))
        for column, cells, width in zip(columns, texts, widths, strict=True)
    ]
    while sum(widths) > room:
        loose = [index for index, width in enumerate(widths) if width > least[index]]
        if not loose:
            return None
        widths[max(loose, key=lambda index: widths[index])] -= 1
    return widths


def _laid_out(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    below: Sequence[Sequence[str]] | None = None,
    *,
    after: bool = True,
) -> list[str]:
    """Write rows in columns.  below: lines of each row besides; after: below it, else above."""
    lines = [*_row(columns, [column.title for column in columns], widths)]
    lines.append("─" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    for index, row in enumerate(rows):
        more = [] if below is None else below[index]
        lines += [*_row(columns, row, widths), *more] if after else [*more, *_row(columns, row, widths)]
    return lines


def _row(columns: Sequence[Column], row: Sequence[str], widths: Sequence[int]) -> list[str]:
    cells = [fold(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for index in range(max(map(len, cells))):
        texts = [cell[index] if index < len(cell) else "" for cell in cells]
        placed = [
            text.rjust(width) if column.numeric else text.ljust(width)
            for column, text, width in zip(columns, texts, widths, strict=True)
        ]
        lines.append(GAP.join(placed).rstrip())
    return lines


def _block(columns: Sequence[Column], row: Sequence[str], width: int) -> list[str]:
    """Write a row as a block: how many and the name, below it all other cells with their titles."""
    named = dict(zip((column.title for column in columns), row, strict=True))
    count = f"{named.pop('#')} x " if "#" in named else ""
    name = "".join(named.pop(column.title) for column in columns if column.name)
    lines = fold(f"{count}{name}", width)
    line = ""
    for index, (title, cell) in enumerate(named.items()):
        item = f"{title} {cell}" + ("," if index < len(named) - 1 else "")
        if line and len(INDENT) + len(line) + 1 + len(item) > width:
            lines.append(INDENT + line)
            line = ""
        *full, line = fold(f"{line} {item}".lstrip(), width - len(INDENT))
        lines += [INDENT + part for part in full]
    return [*lines, INDENT + line]
