"""The paged KV cache: fixed pages, handed out to requests and taken back."""

from __future__ import annotations

import torch
from torch import nn

from pymllm.attention import bytes_per_token
from pymllm.errors import ConfigError
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.layers.held import weight_holders


class PagedKVCache:
    """`num_pages` pages for every attention layer of `model`; page p of all layers belongs to the same request."""

    def __init__(self, model: nn.Module, num_pages: int, device: torch.device) -> None:
        self.num_pages, self.page_size = num_pages, PAGE_SIZE
        self.layers = [holder for _, holder in weight_holders(model) if holder.cache_bytes_per_token()]
        for layer in self.layers:
            layer.attach_cache(num_pages, PAGE_SIZE, device)
        self.free = list(range(num_pages - 1, -1, -1))

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    @staticmethod
    def bytes_per_page(model: nn.Module) -> int:
        return PAGE_SIZE * bytes_per_token(model)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages.  ConfigError if there are not so many; ask `free` first."""
        if count > len(self.free):
            raise ConfigError(
                "the KV cache has too few free pages",
                code="kv-cache-full",
                expected=f"{count} free pages of {PAGE_SIZE} tokens",
                found=str(len(self.free)),
            )
        return [self.free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        self.free.extend(pages)

    def close(self) -> None:
        """Take the cache from the layers."""
        for layer in self.layers:
            layer.detach_cache()
