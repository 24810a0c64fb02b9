"""The attention function that transformers' modules call: it runs our attention layer of the module that calls it."""

# T tokens, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pymllm.attention import Attention
from pymllm.models.generic.probe import AttentionCall, note_attention, probing, read_mask
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.weights.spec import Span

# The names under which transformers knows the function: as it runs, and as a model is probed. A name that has no mask
# function has transformers make no masks, nor look for several texts in one row.
PAGED, PROBED = "pymllm_paged", "pymllm_probed"


def register() -> None:
    """Make the function and its mask known to transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (PAGED, PROBED):
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBED, mask)


def mask(*_: Any, mask_function: Any = None, **__: Any) -> Any:
    """Make no mask, but say which one is asked for."""
    return None if probing() is None else read_mask(mask_function)


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, **settings: Any
) -> tuple[Tensor, None]:
    """Attend over the pages of the step's requests.  q: [1, H, T, D], k: [1, Hkv, T, D], v: [1, Hkv, T, Dv].

    Returns [1, T, H, Dv], and None in the place of the weights.
    """
    if probing() is not None:
        return note_attention(module, q, k, v, attention_mask, settings), None
    layers: PagedLayers = module.paged  # type: ignore[assignment]
    layer = layers.following()
    sinks = layer.own_heads(settings.get("s_aux"))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return layer(q, k, v, sinks)[None], None


class PagedAttention(Attention):
    """An attention layer of a module that may have some of its heads only."""

    def own_heads(self, values: Tensor | None) -> Tensor | None:
        """Cut what has an element for each head of all ranks."""
        if values is None or len(values) == self.num_heads:
            return values
        start = self.parallel.rank * self.num_heads
        return values[start : start + self.num_heads]


class PagedLayers(nn.ModuleList):
    """The attention layers of one module, in the order in which its forward calls them."""

    calls = 0

    def restart(self) -> None:
        """Begin with the first layer."""
        self.__dict__["calls"] = 0

    def following(self) -> PagedAttention:
        """Return the layer of the next call."""
        layer: Any = self[self.calls % len(self)]
        self.__dict__["calls"] = (self.calls + 1) % len(self)
        return layer


def add_attention(
    module: nn.Module,
    name: str,
    calls: list[AttentionCall],
    whole: list[AttentionCall],
    quant_config: QuantizationConfig | None,
) -> None:
    """Give an attention module the layers that its calls run.

    name: the module's.  calls: of this rank.  whole: those of a single rank.
    """
    module.paged = PagedLayers()
    for index, (call, full) in enumerate(zip(calls, whole, strict=True)):
        layer = PagedAttention(
            call.num_heads,
            call.head_dim,
            call.scale,
            call.num_kv_heads,
            sliding_window=call.window,
            value_head_dim=call.value_head_dim,
            soft_cap=call.soft_cap,
            sinks=call.sinks,
            quant_config=quant_config,
            kv_heads=_own_key_heads(call, full),
            prefix=f"{name}.attn" if not index else f"{name}.attn_{index}",
        )
        module.paged.append(layer)


def _own_key_heads(call: AttentionCall, whole: AttentionCall) -> Span:
    """Return this rank's span of the key heads."""
    if call.num_heads == whole.num_heads:
        return Span.full(whole.num_kv_heads)
    rank = current_parallel().rank
    start = rank * call.num_heads * whole.num_kv_heads // whole.num_heads
    return Span(start, start + call.num_kv_heads, whole.num_kv_heads)
