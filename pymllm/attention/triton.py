"""The Triton attention kernels as functions, to call and compare them outside of a model."""

# T tokens, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

from typing import Any

from torch import Tensor

from pymllm.attention.attention import problem_of
from pymllm.kernels.attention import AttentionStep, PagedKV
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.triton.attention import TritonAttention, TritonGroupedAttention


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: AttentionStep,
    *,
    scale: float,
    cache: PagedKV | None = None,
    sinks: Tensor | None = None,
    device: str | None = None,
    **features: Any,
) -> Tensor:
    """Attend as `reference_torch_attention` does, with each head by itself.

    device: the device whose tiles are chosen; None: that of q; under Triton's interpreter "cuda:sm90", for example.
    features: sliding_window and soft_cap, as there.
    """
    problem = problem_of(
        q, k, v, metadata, probe_device(device or str(q.device)), scale, cache, sinks=sinks, **features
    )
    return TritonAttention().run(problem, q, k, v, metadata, cache, sinks)


def triton_grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: AttentionStep,
    *,
    scale: float,
    cache: PagedKV | None = None,
    sinks: Tensor | None = None,
    device: str | None = None,
    **features: Any,
) -> Tensor:
    """Attend as `triton_attention` does, but read keys and values once for all heads that share them."""
    problem = problem_of(
        q, k, v, metadata, probe_device(device or str(q.device)), scale, cache, sinks=sinks, **features
    )
    return TritonGroupedAttention().run(problem, q, k, v, metadata, cache, sinks)
