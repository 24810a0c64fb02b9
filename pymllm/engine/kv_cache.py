"""The paged KV cache: fixed pages, handed out to requests and taken back."""

# P page size, Hkv key heads, D head size

from __future__ import annotations

import torch
from torch import nn

from pymllm.attention import Attention
from pymllm.errors import ConfigError

PAGE_SIZE = 16


class PagedKVCache:
    """`num_pages` pages for every attention layer of `model`; page p of all layers belongs to the same request."""

    def __init__(self, model: nn.Module, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_pages, self.page_size = num_pages, PAGE_SIZE
        self.layers = [module for module in model.modules() if isinstance(module, Attention)]
        for layer in self.layers:
            shape = (num_pages, PAGE_SIZE, layer.num_kv_heads, layer.head_dim)
            layer.k_cache = torch.zeros(shape, dtype=dtype, device=device)
            layer.v_cache = torch.zeros(shape, dtype=dtype, device=device)
        self.free = list(range(num_pages - 1, -1, -1))

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // PAGE_SIZE)

    @staticmethod
    def bytes_per_page(model: nn.Module, dtype: torch.dtype) -> int:
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        return sum(2 * PAGE_SIZE * layer.num_kv_heads * layer.head_dim * dtype.itemsize for layer in layers)

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
            layer.k_cache = layer.v_cache = None
