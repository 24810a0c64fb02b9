"""What a full page of the KV cache holds, as a key: equal keys mean equal keys and values.

A key is a digest of the key of the page before and of the page's own tokens, so that it stands for all tokens up to
the page's end. The first follows from what else decides keys and values: the adapter, and the state of the model. Any
change to a layer (a swap, an adapter loaded, merged or unloaded, another KV method) and any new hook makes another
state; the compute dtype is one for each engine, and so is its cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from torch.utils.hooks import RemovableHandle

from pymllm.layers.held import RevisedModule

# The state of a model, and what keys and values depend on besides the tokens: it, and the adapter.
State = tuple[int, int]
Origin = tuple[State, str | None]


def current_state() -> State:
    """Return a value that is another one after every change to a model's layers, of whichever model."""
    return RevisedModule.revision, RemovableHandle.next_id


class PageKeys:
    """The keys of one request's pages.

    origin: of the request when it began, or began again.  made: the keys so far, of its first pages.
    group: how many pages get their keys together. Where tokens see what comes after them in their block, what a page
    holds follows from all blocks that begin in it, so that a group of pages ends where a block ends.
    """

    def __init__(self, origin: Origin | None = None, group: int = 1) -> None:
        self.origin, self.group = origin, group
        self.made: list[bytes] = []

    def lack(self, tokens: int, page_size: int) -> bool:
        """Tell whether so many tokens fill groups of pages that have no keys yet."""
        return tokens // (page_size * self.group) * self.group > len(self.made)

    def extend(self, tokens: Sequence[int], page_size: int) -> None:
        """Make the keys of all pages that these tokens fill.  tokens: the request's, from its first on."""
        parent = self.made[-1] if self.made else hashlib.sha256(repr(self.origin).encode()).digest()
        size = page_size * self.group
        for start in range(len(self.made) * page_size, len(tokens) - size + 1, size):
            own = array("q", tokens[start : start + size]).tobytes()
            for _ in range(self.group):
                parent = hashlib.sha256(parent + own).digest()
                self.made.append(parent)
