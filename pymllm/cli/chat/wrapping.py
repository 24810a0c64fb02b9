"""Text that comes in pieces, broken into lines between words, as wide as the terminal is."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

FENCE = "```"
# So many characters without a space are no word that anybody waits for.
LONGEST_WORD = 40


class Wrapper:
    """A filter of text in pieces that begins a new line where a word does not fit into the old one.

    Code between fences stays as it is. A word comes out when it has ended.
    columns: tells how wide the terminal is now.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self.columns = columns
        self._column, self._gap, self._word = 0, "", ""
        self._line, self._fenced, self._long = "", False, False

    def feed(self, text: str) -> str:
        """Add a piece.  Returns what can be shown."""
        return "".join(map(self._add, text))

    def flush(self) -> str:
        """Return what was held back: the answer has ended, or something else is to be shown."""
        return self._end_word() + self._take_gap()

    def _add(self, letter: str) -> str:
        if letter == "\n":
            out = self.flush() + letter
            if self._line.lstrip().startswith(FENCE):
                self._fenced = not self._fenced
            self._column, self._line = 0, ""
            return out
        if len(self._line) < 80:
            self._line += letter
        if letter in " \t":
            out = self._end_word()
            self._gap += letter
            return out
        if self._fenced:
            return self._take_gap() + letter
        if get_cwidth(letter) == 2:
            # Between ideographs a line may break anywhere.
            before = self._end_word()
            self._word = letter
            return before + self._end_word()
        self._word += letter
        return self._end_word(ended=False) if len(self._word) >= LONGEST_WORD else ""

    def _end_word(self, *, ended: bool = True) -> str:
        word, self._word = self._word, ""
        if not word:
            self._long = self._long and not ended
            return ""
        width, gap = get_cwidth(word), get_cwidth(self._gap.replace("\t", "        "))
        columns = max(self.columns(), 1)
        goes_on, self._long = self._long, not ended
        if self._column and not goes_on and self._column + gap + width > columns:
            self._gap, self._column = "", width
            return f"\n{word}"
        out = self._take_gap() + word
        self._column += width
        if self._column > columns:
            # The terminal has broken it.
            self._column = self._column % columns or columns
        return out

    def _take_gap(self) -> str:
        gap, self._gap = self._gap, ""
        self._column += get_cwidth(gap.replace("\t", "        "))
        return gap
