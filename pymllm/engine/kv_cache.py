"""The paged KV cache: fixed pages, handed out to requests, shared by those with the same text, and taken back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from pymllm.errors import ConfigError
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.layers.held import weight_holders


class PagedKVCache:
    """`num_pages` pages for every attention layer of `model`; page p of all layers belongs to the same requests.

    A page is held by one request or by several, or it is free. A full page may be kept under a key that says what it
    holds (`prefixes.py`): it can then be found and shared, also while it is free. Free pages that hold nothing are
    handed out first; then the one that has been free for longest, whose key is forgotten.
    """

    def __init__(self, model: nn.Module, num_pages: int, device: torch.device) -> None:
        self.num_pages, self.page_size = num_pages, PAGE_SIZE
        self.layers = [holder for _, holder in weight_holders(model) if holder.cache_bytes_per_token()]
        for layer in self.layers:
            layer.attach_cache(num_pages, PAGE_SIZE, device)
        self._holders = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free pages with keys; the first goes first
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    @property
    def free(self) -> list[int]:
        """The pages that no request holds, those that may be found by their keys included."""
        return [*self._blank, *self._reusable]

    @property
    def available(self) -> int:
        """The number of free pages."""
        return len(self._blank) + len(self._reusable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages.  ConfigError if there are not so many; ask `available` first."""
        if count > self.available:
            raise ConfigError(
                "the KV cache has too few free pages",
                code="kv-cache-full",
                expected=f"{count} free pages of {PAGE_SIZE} tokens",
                found=str(self.available),
            )
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._reusable.popitem(last=False)
            del self._pages[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def release(self, pages: list[int]) -> None:
        """Give up one hold of each of these pages of one request, in its order.

        The last are the first to be handed out again, as a page is only found after those before it.
        """
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._keys:
                self._reusable[page] = None
            else:
                self._blank.append(page)

    def find(self, key: bytes) -> int | None:
        """Return the page that is kept under a key, or None."""
        return self._pages.get(key)

    def share(self, pages: Sequence[int]) -> None:
        """Hold these pages once more; they may be free."""
        for page in pages:
            self._reusable.pop(page, None)
            self._holders[page] += 1

    def count_free(self, pages: Sequence[int]) -> int:
        """Return how many of these pages no request holds."""
        return sum(not self._holders[page] for page in pages)

    def keep(self, page: int, key: bytes) -> None:
        """Have a full page, which is held, found by its key from now on.  If another page is, do nothing."""
        if page not in self._keys and key not in self._pages:
            self._pages[key], self._keys[page] = page, key

    def forget(self, pages: Sequence[int]) -> None:
        """Have these pages, which are held, not be found any more."""
        for page in pages:
            if page in self._keys:
                del self._pages[self._keys.pop(page)]

    def close(self) -> None:
        """Take the cache from the layers."""
        for layer in self.layers:
            layer.detach_cache()
