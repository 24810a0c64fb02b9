"""A step as numbers: what every rank has to know to make the same forward."""

# R requests

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from pymllm.engine.request import Request

# The numbers of a request: where its tokens begin, how many tokens, pages and rows it has, whether it reads its prompt,
# its adapter's place in the list of names, its state's slot, and the first and the last position of the tokens after
# which logits are scored; -1: it has none.
COLUMNS = 9


@dataclass(frozen=True)
class Run:
    """The step of R requests: a list of R for each property.

    tokens: to run, from position `starts` on.  pages: of each request's keys and values.  rows: after which of its
    tokens logits are wanted.  prefilling: whether it reads its prompt.  adapters: the LoRA adapter of each, or None.
    slots: of states; None: there are none.  scored: the positions whose logits are scored.
    """

    tokens: Sequence[Sequence[int]]
    starts: Sequence[int]
    pages: Sequence[Sequence[int]]
    rows: Sequence[Sequence[int]]
    prefilling: Sequence[bool]
    adapters: Sequence[str | None]
    slots: Sequence[int] | None
    scored: Sequence[range]

    @classmethod
    def of(cls, requests: Sequence[Request], slots: Sequence[int] | None) -> Run:
        """Collect what the scheduler has planned for these requests."""
        return cls(
            [request.running_sequence for request in requests],
            [request.computed for request in requests],
            [request.pages for request in requests],
            [request.rows for request in requests],
            [request.is_prefilling for request in requests],
            [request.adapter for request in requests],
            slots,
            [request.unscored for request in requests],
        )

    def to_integers(self) -> tuple[np.ndarray[Any, Any], list[str]]:
        """Write the step as integers, and the names of its adapters."""
        names = sorted({name for name in self.adapters if name is not None})
        places: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(names)}}
        count = len(self.tokens)
        table = [
            self.starts,
            [len(tokens) for tokens in self.tokens],
            [len(pages) for pages in self.pages],
            [len(rows) for rows in self.rows],
            self.prefilling,
            [places[name] for name in self.adapters],
            [-1] * count if self.slots is None else self.slots,
            [span.start for span in self.scored],
            [span.stop for span in self.scored],
        ]
        lists = [part for kind in (self.tokens, self.pages, self.rows) for part in kind]
        head = np.array([[count] * COLUMNS, *zip(*table, strict=True)], dtype=np.int64).reshape(-1)
        flat = np.fromiter((each for part in lists for each in part), dtype=np.int64)
        return np.concatenate([head, flat]), names

    @classmethod
    def from_integers(cls, integers: np.ndarray[Any, Any], names: Sequence[str]) -> Run:
        """Read what `to_integers` has written."""
        count = int(integers[0])
        table = integers[COLUMNS : COLUMNS * (count + 1)].reshape(count, COLUMNS).T.tolist()
        starts, *sizes, prefilling, adapters, slots, first, last = table
        flat = integers[COLUMNS * (count + 1) :].tolist()
        bounds = [0, *accumulate(size for kind in sizes for size in kind)]
        lists = [flat[start:stop] for start, stop in pairwise(bounds)]
        return cls(
            lists[:count],
            starts,
            lists[count : 2 * count],
            lists[2 * count :],
            [bool(each) for each in prefilling],
            [None if place < 0 else names[place] for place in adapters],
            slots if any(slot >= 0 for slot in slots) else None,
            [range(start, stop) for start, stop in zip(first, last, strict=True)],
        )
