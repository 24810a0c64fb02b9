"""Storing keys and values in pages with torch operations, for any device and any type of cache."""

# T tokens, Hkv key heads, D head size

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionProblem, AttentionStep, KVType, PagedKV
from pymllm.kernels.canonical import E4M3_MAX

INT8_MIN, INT8_MAX = -128.0, 127.0


class TorchKVStore:
    """A KV store that scales, rounds and scatters."""

    name = "torch"

    def why_not(self, problem: AttentionProblem) -> str | None:
        return None

    def run(
        self, problem: AttentionProblem, k: Tensor, v: Tensor, cache: PagedKV, step: AttentionStep
    ) -> None:
        mapping = step.stored_slots(k.shape[0], cache.k.shape[0] * cache.k.shape[1])
        tokens, slots = step.once("stored tokens", lambda: _stored(mapping), mapping)
        for new, pages, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
            codes, scale = encode_kv(new if tokens is None else new[tokens], cache.type, scales)
            # Not every device scatters fp8; every one scatters its bytes.
            raw = torch.uint8 if cache.type.dtype.itemsize == 1 else cache.type.dtype
            pages.flatten(0, 1).view(raw)[slots] = codes.view(raw)
            if scale is not None and scales is not None:
                scales.flatten(0, 1)[slots] = scale


def _stored(slots: Tensor) -> tuple[Tensor | None, Tensor]:
    """Select the tokens that have a slot (None: all have) and their slots."""
    kept = slots >= 0
    if bool(kept.all()):
        return None, slots
    tokens = kept.nonzero().squeeze(-1)
    return tokens, slots[tokens]


def encode_kv(x: Tensor, kind: KVType, static_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Encode keys or values as a cache of this type stores them.

    x: [T, Hkv, D].  static_scale: [Hkv], for static scaling.  Returns codes [T, Hkv, D], and the scales of each token's
    heads, float32 [T, Hkv], or None where the type has no such scales.
    """
    if kind.scaling == "none":
        return x.to(kind.dtype), None
    values = x.float()
    largest = E4M3_MAX if kind.dtype is torch.float8_e4m3fn else INT8_MAX
    if kind.scaling == "static":
        assert static_scale is not None
        scale = static_scale.unsqueeze(-1)
    else:
        # A head of zeros gets the smallest normal number: its scale must not be 0, as values are divided by it.
        smallest = torch.finfo(torch.float32).smallest_normal
        scale = (values.abs().amax(-1, keepdim=True) / largest).clamp(min=smallest)
    codes = values / scale
    codes = codes.clamp(-largest, largest) if largest == E4M3_MAX else codes.round().clamp(INT8_MIN, INT8_MAX)
    return codes.to(kind.dtype), scale.squeeze(-1) if kind.scaling == "token" else None
