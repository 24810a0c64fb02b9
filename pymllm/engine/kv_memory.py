"""How large the KV cache becomes: the context that is wanted, the memory that it may take, and which decides."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pymllm.errors import ConfigError
from pymllm.kernels.attention import PAGE_SIZE

# How many tokens a cache has by default, if the context is not longer.
DEFAULT_CACHE_TOKENS = 16384

# What the cache takes at most by default, of the memory that is free beside the weights.
CACHE_MEMORY_SHARE = 0.25

# What is assumed to be free where the system does not say.
UNKNOWN_MEMORY = 4 << 30

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(|[kmg]i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class CacheSize:
    """The size of a rank's KV cache.

    tokens: of all requests together; a whole number of pages.  bytes: of all its pages.  max_model_len: the most tokens
    that one request may have.  decided_by: what was the limit, for people.
    """

    tokens: int
    bytes: int
    max_model_len: int
    decided_by: str

    @property
    def pages(self) -> int:
        return self.tokens // PAGE_SIZE


def read_size(size: int | str) -> int:
    """Read a number of bytes: an integer, or text such as "2GB" (a thousand of one to the next) or "512MiB" (1024).

    ConfigError for anything else, and below 1.
    """
    match = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        size = int(float(match[1]) * UNITS[match[2].lower()])
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(
            "kv_memory is no size of memory",
            code="kv-memory",
            expected="a number of bytes, or text such as '2GB' or '512MiB'",
            found=repr(size),
        )
    return size


def choose_cache_size(
    longest: int,
    token_bytes: int,
    available: int | None,
    *,
    max_model_len: int | None = None,
    kv_memory: int | str | None = None,
) -> CacheSize:
    """Choose the size of a rank's cache.

    longest: the most tokens that the model knows positions for.  token_bytes: what a token takes.  available: the bytes
    that are free beside the weights; None: nobody knows.  max_model_len: the most tokens that a request shall have;
    None: as many as the model and the cache allow.  kv_memory: what the cache may take; None: CACHE_MEMORY_SHARE of
    what is available, and no more than DEFAULT_CACHE_TOKENS or one request need.
    ConfigError, with the numbers, for a max_model_len beyond the model's positions or the memory.
    """
    if max_model_len is not None and not _within(max_model_len, longest):
        raise ConfigError(
            "max_model_len is out of the model's range",
            code="max-model-len",
            expected=f"an integer from 1 to {longest}, the model's max_position_embeddings",
            found=repr(max_model_len),
        )
    context = longest if max_model_len is None else max_model_len
    if kv_memory is not None:
        budget, source = read_size(kv_memory), "kv_memory"
    else:
        budget = int((UNKNOWN_MEMORY if available is None else available) * CACHE_MEMORY_SHARE)
        source = f"{CACHE_MEMORY_SHARE:.0%} of the memory that is free beside the weights"
    wanted = -(-max(context, DEFAULT_CACHE_TOKENS) // PAGE_SIZE)
    page_bytes = PAGE_SIZE * token_bytes
    affordable = budget // page_bytes if page_bytes else wanted
    if kv_memory is None and max_model_len is None:
        affordable = max(affordable, 1)
    needed = -(-context // PAGE_SIZE)
    if affordable < 1 or (max_model_len is not None and affordable < needed):
        raise ConfigError(
            f"a context of {context} tokens does not fit into the KV cache",
            code="kv-memory",
            expected=f"at most {affordable * PAGE_SIZE} tokens, as {_size(budget)} ({source}) hold",
            found=f"{context} tokens of {token_bytes} bytes: {_size(needed * page_bytes)}",
            fix="Give the cache more memory (--kv-memory, kv_memory=), ask for a shorter context (--max-model-len, "
            "max_model_len=), or store keys and values in fewer bits (--kv-cache fp8).",
        )
    if kv_memory is not None:
        pages, decided_by = affordable if page_bytes else wanted, source
    elif affordable < wanted:
        pages, decided_by = affordable, source
    elif context >= DEFAULT_CACHE_TOKENS:
        pages, decided_by = wanted, "one request of the longest context"
    else:
        pages, decided_by = wanted, f"{DEFAULT_CACHE_TOKENS} tokens by default"
    tokens = pages * PAGE_SIZE
    return CacheSize(tokens, pages * page_bytes, min(context, tokens), decided_by)


def _within(count: object, most: int) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= most


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
