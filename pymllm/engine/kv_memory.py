"""How large the KV cache becomes: the context that is wanted, the memory that it may take, and which decides.

Where layers keep a state of each request, that memory holds the states too: half of it at most.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pymllm.engine.scheduler import MAX_REQUESTS
from pymllm.errors import ConfigError, counted
from pymllm.kernels.attention import PAGE_SIZE

# How many tokens a cache has by default, if the context is not longer.
DEFAULT_CACHE_TOKENS = 16384

# What the cache takes at most by default, of the memory that is free beside the weights.
CACHE_MEMORY_SHARE = 0.25

# The same on a GPU, whose memory is there for the model, of what steps leave.
GPU_MEMORY_SHARE = 0.9

# How many states are remembered at most, for the prefixes of requests to come.
MOST_REMEMBERED = 16

# What is assumed to be free where the system does not say.
UNKNOWN_MEMORY = 4 << 30

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(|[kmg]i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class CacheSize:
    """The size of a rank's KV cache.

    tokens: of all requests together; a whole number of pages.  bytes: of all its pages.  max_model_len: the most tokens
    that one request may have.  decided_by: what was the limit, for people.
    requests: how many may run at a time.  remembered_states: how many states are kept for prefixes at most.
    state_bytes: of all states, those of the running requests, a spare one, and the remembered ones; 0: there are none.
    """

    tokens: int
    bytes: int
    max_model_len: int
    decided_by: str
    requests: int = MAX_REQUESTS
    remembered_states: int = 0
    state_bytes: int = 0

    @property
    def pages(self) -> int:
        return self.tokens // PAGE_SIZE


def read_size(size: int | str, available: int | None = None) -> int:
    """Read a number of bytes: an integer, or text such as "2GB" (a thousand of one to the next) or "512MiB" (1024).

    available: what a share such as "30%" is of; None: nobody knows.  ConfigError for anything else, and below 1.
    """
    match = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    share = SHARE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is not None:
        size = int(float(match[1]) * UNITS[match[2].lower()])
    elif share is not None and 0 < float(share[1]) <= 100:
        size = int((UNKNOWN_MEMORY if available is None else available) * float(share[1]) / 100)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(
            "kv_memory is no size of memory",
            code="kv-memory",
            expected="a number of bytes, text such as '2GB' or '512MiB', or a share such as '30%'",
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
    state_bytes: int = 0,
    block_length: int = 1,
    on_gpu: bool = False,
    working: int = 0,
) -> CacheSize:
    """Choose the size of a rank's cache, and how many states of requests there are beside it.

    longest: the most tokens that the model knows positions for.  token_bytes: what a token takes.  available: the bytes
    that are free beside the weights; None: nobody knows.  max_model_len: the most tokens that a request shall have;
    None: as many as the model and the cache allow.  kv_memory: what the cache may take; None: CACHE_MEMORY_SHARE of
    what is available, and no more than DEFAULT_CACHE_TOKENS or one request need.  state_bytes: of one request's state.
    block_length: of how many tokens those are that run together; a request's last block has positions and pages, too.
    on_gpu: whether the cache is on a GPU: by default it takes GPU_MEMORY_SHARE of what is available, but no more than
    MAX_REQUESTS of the longest context need.  working: of what is available there, the bytes that steps take.
    ConfigError, with the numbers, for a max_model_len beyond the model's positions or the memory, and for a kv_memory
    that a GPU does not have.
    """
    positions, longest = longest, longest // block_length * block_length
    if not longest:
        raise ConfigError(
            "the model's context is shorter than a block",
            code="max-model-len",
            expected=f"a block_length from 1 to {positions}, the model's max_position_embeddings",
            found=str(block_length),
        )
    if max_model_len is not None and not _within(max_model_len, longest):
        raise ConfigError(
            "max_model_len is out of the model's range",
            code="max-model-len",
            expected=f"an integer from 1 to {longest}, the model's max_position_embeddings"
            + (f" in whole blocks of {block_length}" if longest < positions else ""),
            found=repr(max_model_len),
        )
    context = longest if max_model_len is None else max_model_len
    budget, source = _choose_budget(available, kv_memory, on_gpu, working)
    whole = _whole(context, block_length)
    wanted = -(-(MAX_REQUESTS * whole if on_gpu else max(whole, DEFAULT_CACHE_TOKENS)) // PAGE_SIZE)
    page_bytes, needed = PAGE_SIZE * token_bytes, -(-whole // PAGE_SIZE)
    least = -(-block_length // PAGE_SIZE)  # what the shortest request needs
    asked = 0 if max_model_len is None else needed * page_bytes
    if on_gpu and available is None and kv_memory is None:
        budget = max(budget, asked + 2 * state_bytes)  # nobody knows that it has no room
    requests, remembered, states = _choose_states(budget, asked, state_bytes)
    left = budget - states
    affordable = max(left, 0) // page_bytes if page_bytes else wanted * (left >= 0)
    if kv_memory is None and max_model_len is None:
        affordable = max(affordable, least)
    if affordable < least or (max_model_len is not None and affordable < needed):
        raise ConfigError(
            f"a context of {context} tokens does not fit into the KV cache",
            code="kv-memory",
            expected=f"at most {affordable * PAGE_SIZE} tokens, as {_size(budget)} ({source}) hold"
            + (f" beside {_size(states)} of states" if states else ""),
            found=f"{context} tokens of {token_bytes} bytes: {_size(needed * page_bytes)}",
            fix="Give the cache more memory (--kv-memory, kv_memory=), ask for a shorter context (--max-model-len, "
            "max_model_len=), or store keys and values in fewer bits (--kv-cache fp8).",
        )
    if kv_memory is not None:
        pages, decided_by = affordable if page_bytes else wanted, source
    elif affordable < wanted:
        pages, decided_by = affordable, source
    elif on_gpu:
        pages, decided_by = wanted, f"{MAX_REQUESTS} requests of the longest context"
    elif context >= DEFAULT_CACHE_TOKENS:
        pages, decided_by = wanted, "one request of the longest context"
    else:
        pages, decided_by = wanted, f"{counted(DEFAULT_CACHE_TOKENS, 'token')} by default"
    tokens = pages * PAGE_SIZE
    most = min(context, tokens // block_length * block_length)
    return CacheSize(tokens, pages * page_bytes, most, decided_by, requests, remembered, states)


def _choose_budget(
    available: int | None, kv_memory: int | str | None, on_gpu: bool, working: int
) -> tuple[int, str]:
    """Return how many bytes the cache may take, and what says so.  The arguments: see `choose_cache_size`."""
    left = UNKNOWN_MEMORY if available is None else max(available - working, 0)
    if kv_memory is None:
        share, of = CACHE_MEMORY_SHARE, "the memory that is free beside the weights"
        if on_gpu:
            share, of = GPU_MEMORY_SHARE, "the GPU's memory that weights and steps leave free"
        if on_gpu and available is None:
            of = f"{_size(UNKNOWN_MEMORY)}, as the memory of that GPU is not known here"
        return int(left * share), f"{share:.0%} of {of}"
    budget = read_size(kv_memory, available)
    is_share = isinstance(kv_memory, str) and kv_memory.strip().endswith("%")
    source = f"kv_memory, {kv_memory} of what is free beside the weights" if is_share else "kv_memory"
    if not on_gpu or available is None or budget <= left:
        return budget, source
    if is_share:
        return left, f"{source}, less {_size(working)} that steps take"
    raise ConfigError(
        "kv_memory is more than the GPU has left beside the weights",
        code="kv-memory",
        expected=f"at most {_size(left)}: {_size(available)} are free, and steps take {_size(working)}",
        found=str(kv_memory),
        fix="Ask for less (--kv-memory, kv_memory=), or leave it out: the cache then takes what there is.",
    )


def _choose_states(budget: int, asked: int, state_bytes: int) -> tuple[int, int, int]:
    """Choose how many requests have a state, and how many states are remembered.

    budget: bytes of pages and states together.  asked: those of the pages that a request of the length that was asked
    for needs.  Returns both numbers, and the bytes of all states: one request's and the spare one at least.
    """
    if not state_bytes:
        return MAX_REQUESTS, 0, 0
    affordable = min(budget // 2, budget - asked) // state_bytes - 1
    requests = max(1, min(MAX_REQUESTS, affordable * 4 // 5))
    remembered = max(0, min(MOST_REMEMBERED, affordable - requests))
    return requests, remembered, (requests + 1 + remembered) * state_bytes


def _whole(count: int, length: int) -> int:
    """Round a number of tokens up to whole blocks."""
    return -(-count // length) * length


def _within(count: object, most: int) -> bool:
    return isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= most


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
