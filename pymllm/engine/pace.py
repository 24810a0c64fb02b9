"""How many tokens of prompts a step may read beside answers, so that no answer waits long for its next token."""

from __future__ import annotations

import math

from pymllm.errors import ConfigError
from pymllm.kernels.attention import PAGE_SIZE

# How long a step may take beside answers, in milliseconds.
STEP_MS = 150.0

# Tokens of the first piece that is read beside answers while no speed is known, and of the smallest piece at all.
FIRST_PIECE = 64
SMALLEST_PIECE = PAGE_SIZE

# A step that takes so many times what those before it promise says nothing of the next: the machine slept, perhaps, or
# a kernel was compiled. Two in a row say that steps have become slow.
ODD_TIMES = 20.0

# How much less each step counts than the one after it.
DECAY = 0.5


class Pace:
    """The measured speed of steps, and the piece of a prompt that fits into a step's time.

    seconds: what a step beside answers may take.

    A step takes what its answers take, as in a step without a prompt, and beside it a time for each token that is read.
    Both are averages in which later steps count more.
    """

    def __init__(self, step_ms: float = STEP_MS) -> None:
        self.seconds = step_ms / 1000
        self._decoding: float | None = None  # seconds of a step that reads nothing
        self._reading = self._read = 0.0  # seconds that were taken by so many tokens
        self._was_odd = False

    def note(self, seconds: float, read: int, answers: int) -> None:
        """Take in a step.  seconds: what it took.  read: its tokens of prompts.  answers: how many it went on with."""
        if self._is_odd(seconds, read):
            return
        if not read:
            known = seconds if self._decoding is None else self._decoding
            self._decoding = DECAY * known + (1 - DECAY) * seconds
            return
        # A short piece costs what a step costs, whatever its length.
        if read < SMALLEST_PIECE:
            return
        beside = (self._decoding or 0.0) if answers else 0.0
        self._reading = self._reading * DECAY + max(seconds - beside, seconds / 10)
        self._read = self._read * DECAY + read

    def _is_odd(self, seconds: float, read: int) -> bool:
        """Tell whether a step is to be left out, as it alone took so long."""
        known = (self._decoding or 0.0) + (self._reading * read / self._read if read and self._read else 0.0)
        promised = bool(self._read) if read else self._decoding is not None
        odd = promised and seconds > max(ODD_TIMES * known, self.seconds)
        self._was_odd, leave_out = odd, odd and not self._was_odd
        return leave_out

    def piece(self) -> int:
        """Return how many tokens of prompts the next step may read beside answers."""
        if not self._reading:
            return FIRST_PIECE
        left = self.seconds - (self._decoding or 0.0)
        return max(int(left * self._read / self._reading) // PAGE_SIZE * PAGE_SIZE, SMALLEST_PIECE)


def check_step_ms(step_ms: float) -> None:
    """Refuse with ConfigError what is no time."""
    is_number = isinstance(step_ms, (int, float)) and not isinstance(step_ms, bool)
    if not is_number or not 0 < step_ms < math.inf:
        raise ConfigError(
            "step_ms is no time",
            code="step-ms",
            expected=f"milliseconds above 0, {STEP_MS:g} say",
            found=repr(step_ms),
        )
