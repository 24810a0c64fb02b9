"""What attention layers must know of a step, and the hook through which they fetch it.

A runner installs a fetch function once and makes the current step's metadata available through it; a decoding strategy
adds its own subclass of `AttnMetaDataBase` beside itself.
"""

# R requests, T tokens of this step

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pymllm.errors import ConfigError
from pymllm.kernels.attention import AttentionStep


@dataclass(eq=False)
class AttnMetaDataBase(AttentionStep):
    """One step's requests, side by side: what kernels read (`AttentionStep`), and what runners and strategies add.

    is_prefill: whether a request still reads its prompt; one value for all, or one each.
    enforce_eager: run outside any captured graph.
    kv_cache_layout: "unified" is [pages, P, Hkv, D] for keys and for values, the only one there is.
    """

    is_prefill: bool | Sequence[bool] = False
    enforce_eager: bool = True
    kv_cache_layout: Literal["unified"] = "unified"

    def __post_init__(self) -> None:
        if self.kv_cache_layout != "unified":
            raise ConfigError(
                f"there is no KV cache layout {self.kv_cache_layout!r}",
                code="kv-cache-layout",
                expected="unified",
                found=repr(self.kv_cache_layout),
            )

    @property
    def has_prefill(self) -> bool:
        """Whether any request reads its prompt."""
        return self.is_prefill if isinstance(self.is_prefill, bool) else any(self.is_prefill)

    @property
    def all_prefill(self) -> bool:
        """Whether every request does, and there is one."""
        if isinstance(self.is_prefill, bool):
            return self.is_prefill
        return len(self.is_prefill) > 0 and all(self.is_prefill)


_fetch: Callable[[], AttnMetaDataBase] | None = None
_warming_up = False


def set_fetch_fn_for_attn_metadata(fn: Callable[[], AttnMetaDataBase] | None) -> None:
    """Install how attention layers get the current step's metadata."""
    global _fetch
    _fetch = fn


def fetch_attn_metadata() -> AttnMetaDataBase:
    """The current step's metadata.  ConfigError if no runner has installed a fetch function."""
    if _fetch is None:
        raise ConfigError(
            "attention has no metadata to read",
            code="no-attention-metadata",
            fix="The runner must call set_fetch_fn_for_attn_metadata(fn) before the model's forward.",
        )
    return _fetch()


def current_attn_metadata() -> AttnMetaDataBase | None:
    """The same, or None outside a runner's step."""
    try:
        return None if _fetch is None else _fetch()
    except LookupError:  # of a context variable that no step has set
        return None


def set_warming_up(value: bool = True) -> None:
    """Say that the runs to come only warm up (a graph capture, say)."""
    global _warming_up
    _warming_up = value


def is_warming_up() -> bool:
    return _warming_up


def reset_warming_up() -> None:
    set_warming_up(False)
