"""A step's metadata, which attention layers read, and the hook through which they fetch it.

A runner installs a fetch function once, and that function returns the metadata of the current step. A decoding strategy
defines a subclass of `AttnMetaDataBase` of its own.
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

    is_prefill: whether a request still reads its prompt; one value for all requests, or one for each.
    enforce_eager: whether the step must run outside any captured graph.
    kv_cache_layout: "unified", the only one that there is: [pages, P, Hkv, D] for keys and for values.
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
        """True where some request still reads its prompt."""
        return self.is_prefill if isinstance(self.is_prefill, bool) else any(self.is_prefill)

    @property
    def all_prefill(self) -> bool:
        """True where there are requests, and all still read their prompts."""
        if isinstance(self.is_prefill, bool):
            return self.is_prefill
        return len(self.is_prefill) > 0 and all(self.is_prefill)


_fetch: Callable[[], AttnMetaDataBase] | None = None
_warming_up = False


def set_fetch_fn_for_attn_metadata(fn: Callable[[], AttnMetaDataBase] | None) -> None:
    """Install the function that returns the current step's metadata; None: there is none any more."""
    global _fetch
    _fetch = fn


def fetch_attn_metadata() -> AttnMetaDataBase:
    """Return the current step's metadata.  ConfigError if no runner has installed a fetch function."""
    if _fetch is None:
        raise ConfigError(
            "an attention layer runs outside of a step: nothing gives it the requests' lengths and pages",
            code="no-attention-metadata",
            fix="The runner must call set_fetch_fn_for_attn_metadata(fn) before the model's forward.",
        )
    return _fetch()


def current_attn_metadata() -> AttnMetaDataBase | None:
    """Return the current step's metadata, or None outside a runner's step."""
    try:
        return None if _fetch is None else _fetch()
    except LookupError:  # a runner's context variable, which no step has set
        return None


def set_warming_up(value: bool = True) -> None:
    """Say that the runs to come only warm up, for a graph capture for example."""
    global _warming_up
    _warming_up = value


def is_warming_up() -> bool:
    return _warming_up


def reset_warming_up() -> None:
    set_warming_up(False)
