"""The attention layer: stores new keys and values in its pages, then runs the chosen kernel over the whole step."""

# T tokens of this step, H query heads, Hkv key heads, D head size, Dv value head size

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from pymllm.config import Execution, current_execution
from pymllm.errors import ConfigError, counted
from pymllm.kernels.attention import AttentionKernel, AttentionProblem, AttentionStep, KVStoreKernel, PagedKV
from pymllm.kernels.hardware import Device, probe_device
from pymllm.kernels.native.addresses import unfit
from pymllm.kernels.reference.attention import ReferenceAttention
from pymllm.kernels.registry import Selection, select
from pymllm.layers.held import Binder, Description, WeightHolder, weight_holders
from pymllm.layers.rotary_embedding import RotaryEmbedding
from pymllm.layers.step import current_attn_metadata, fetch_attn_metadata
from pymllm.parallel import current_parallel
from pymllm.quantization.base import QuantizationConfig
from pymllm.quantization.kv_cache import KVCacheMethodBase, QuantizedKVCacheMethod, UnquantizedKVCacheMethod
from pymllm.weights.spec import LinearShape, Span


class Attention(WeightHolder):
    """Attention of grouped heads over this step's tokens and what the cache holds.

    attn_impl: "auto", or a kernel's name.  sliding_window: how many positions a query sees; None: all of them.
    value_head_dim: the size of a value head; None: head_dim.  soft_cap: the limit of the scaled logits; None: no limit.
    sinks: whether `forward` gets one more logit for each head, which takes part in the softmax without a value.
    bidirectional: whether a query sees what comes after it, too, as in an encoder, which caches nothing.
    quant_method: how keys and values are stored; None: as quant_config says, else in the activations' dtype.
    kv_heads: this rank's span of the key heads, for scales that have one element a head.
    prefix: the layer's name.  The checkpoint names scales after the module around the layer.
    cache: the layer's pages, which the engine sets; None: nothing is cached.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        num_kv_heads: int,
        attn_impl: str = "auto",
        sliding_window: int | None = None,
        *,
        value_head_dim: int | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        bidirectional: bool = False,
        quant_method: KVCacheMethodBase | None = None,
        quant_config: QuantizationConfig | None = None,
        kv_heads: Span | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ConfigError(
                "the query heads cannot be divided evenly over the key heads",
                code="config-value",
                tensor=prefix or None,
                expected=f"a divisor of {counted(num_heads, 'head')}",
                found=str(num_kv_heads),
            )
        self.parallel = current_parallel()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.num_kv_heads, self.sliding_window, self.prefix = num_kv_heads, sliding_window, prefix
        self.value_head_dim = head_dim if value_head_dim is None else value_head_dim
        self.shape = LinearShape(
            Span.full(1), (kv_heads or Span.full(num_kv_heads),), (prefix.rpartition(".")[0],), torch.float32
        )
        if quant_method is None and quant_config is not None and not bidirectional:
            quant_method = quant_config.get_kv_cache_method(self, prefix)
        self.quant_method: KVCacheMethodBase = quant_method or UnquantizedKVCacheMethod()
        self.quant_method.create_weights(self)
        self.kv_scales: tuple[Tensor, ...] = ()  # once loaded: of keys and values, [Hkv] each
        execution = current_execution() or Execution(dtype=torch.get_default_dtype())
        self.problem = AttentionProblem(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=self.value_head_dim,
            scale=scale,
            dtype=execution.dtype,
            device=probe_device(execution.device),
            kv=self.quant_method.kv_type((None if bidirectional else execution.kv_dtype) or execution.dtype),
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
            bidirectional=bidirectional,
            block_causal=execution.block_length > 1 and not bidirectional,
        )
        self.forced = execution.forced_kernel("attention") if attn_impl == "auto" else attn_impl
        self.selection: Selection[AttentionKernel] = select("attention", self.problem, self.forced)
        self.store_selection: Selection[KVStoreKernel] = select(
            "kv_store", self.problem, execution.forced_kernel("kv_store")
        )
        self.cache: PagedKV | None = None

    # What a holder of weights answers: see `pymllm.layers.held`

    def describe(self, binder: Binder) -> Iterator[Description]:
        """Describe the KV cache and the attention kernel for a plan."""
        problem, method, kernel = self.problem, self.quant_method, self.selection.kernel
        quantised = isinstance(method, QuantizedKVCacheMethod)
        numerics = getattr(kernel, "numerics", None)
        cache = f"KV cache in {method.describe() if quantised else problem.kv}"
        rounding = f"keys and values rounded to {method.name}, " if quantised else ""
        yield Description(
            self.prefix,
            "attention",
            method,
            "no KV cache" if problem.bidirectional else cache,
            self.selection,
            rounding + ("sums in float32" if numerics is None else numerics(problem)),
            False,
            (self.num_heads * self.parallel.size, self.shape.out_features, self.head_dim),
            (self.num_heads, self.num_kv_heads, self.head_dim),
            kv_bytes_per_token=self.cache_bytes_per_token(),
        )

    def selections(self, binder: Binder | None = None) -> tuple[Selection[Any], ...]:
        """Return two kernels: the one that attends, and the one that stores keys and values."""
        return self.selection, self.store_selection

    def cache_bytes_per_token(self) -> int:
        """Return the bytes that the keys and values of a token take, on this rank."""
        if self.problem.bidirectional:
            return 0
        return self.problem.kv.bytes_per_token(self.num_kv_heads, self.head_dim, self.value_head_dim)

    def attach_cache(self, num_pages: int, page_size: int, device: torch.device) -> None:
        """Give the layer `num_pages` empty pages of `page_size` tokens each."""
        self.cache = self.quant_method.allocate(self, num_pages, page_size, device)

    def detach_cache(self) -> None:
        """Take the pages away."""
        self.cache = None

    def finish(self) -> None:
        """Spread the loaded scales over this rank's heads."""
        self.quant_method.process_weights_after_loading(self)

    def rotates_as(self, rotary: nn.Module) -> TypeGuard[RotaryEmbedding]:
        """Tell whether `forward` can rotate q and k as `rotary` does: in one kernel with the store of this step."""
        if not hasattr(self.store_selection.kernel, "rotate_and_store"):
            return False
        if not isinstance(rotary, RotaryEmbedding) or type(rotary).forward is not RotaryEmbedding.forward:
            return False
        if any(m._forward_hooks or m._forward_pre_hooks for m in (self, rotary)):  # which look at q and k
            return False
        step = current_attn_metadata()
        return (
            step is not None
            and step.page_tables is not None
            and step.need_kv_cache_store
            and (step.causal or self.problem.block_causal)
            and self.cache is not None
            and self.quant_method.stores_in_place
            and rotary.head_size == self.head_dim
            and getattr(rotary.kernel, "rotates_in_store", False)
            and getattr(self.selection.kernel, "reads_pages", False)
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Store this step's keys and values, and attend to all that the requests have.

        q: [T, H·D] or [T, H, D]; k: [T, Hkv·D] and v: [T, Hkv·Dv], or by heads; sinks: [H].
        rotation: the cosines and sines, [T, R/2], by which q and k are to be rotated first, if `rotates_as` allows it.
        Returns [T, H·Dv] or [T, H, Dv], as q came.
        """
        flat = isinstance(q, Tensor) and q.ndim == 2
        q = _by_heads("q", q, self.num_heads, self.head_dim)
        k = _by_heads("k", k, self.num_kv_heads, self.head_dim)
        v = _by_heads("v", v, self.num_kv_heads, self.value_head_dim)
        if q.shape[0] == 0:
            result = q.new_empty((0, self.num_heads, self.value_head_dim))
            return result.flatten(1) if flat else result
        step = fetch_attn_metadata()
        if rotation is None:
            result = self.quant_method.apply(self, q, k, v, step, sinks)
        else:
            result = self.quant_method.apply(self, q, k, v, step, sinks, rotation)
        return result.flatten(1) if flat else result


def _by_heads(name: str, tensor: Tensor, heads: int, size: int) -> Tensor:
    """Return [T, heads · size] or [T, heads, size] as the latter.  Raises ConfigError for anything else."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested:
        shape = tensor.shape
        if len(shape) == 3 and shape[1] == heads and shape[2] == size:
            return tensor
        if len(shape) == 2 and shape[1] == heads * size:
            return tensor.view(shape[0], heads, size)
    raise unfit(name, tensor, ("T", heads, size))


def bytes_per_token(model: nn.Module) -> int:
    """Return the bytes that a token takes in the KV cache: keys and values of all layers of `model`, on this rank."""
    return sum(holder.cache_bytes_per_token() for _, holder in weight_holders(model))


def reference_torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: AttentionStep,
    *,
    scale: float,
    cache: PagedKV | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend by the plain formula, for debugging.  q: [T, H, D], k: [T, Hkv, D], v: [T, Hkv, Dv].  Returns [T, H, Dv].

    cache: pages that hold this step's keys and values already; None: all tokens of every request are new.
    """
    problem = problem_of(
        q, k, v, metadata, probe_device(str(q.device)), scale, cache, sliding_window, soft_cap, sinks
    )
    return ReferenceAttention().run(problem, q, k, v, metadata, cache, sinks)


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    metadata: AttentionStep,
    device: Device,
    scale: float,
    cache: PagedKV | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> AttentionProblem:
    """Make the problem that these tensors pose to a kernel on `device`."""
    return AttentionProblem(
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        value_head_dim=v.shape[2],
        scale=scale,
        dtype=q.dtype,
        device=device,
        kv=UnquantizedKVCacheMethod().kv_type(q.dtype) if cache is None else cache.type,
        page_size=metadata.page_size,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks is not None,
        block_causal=not metadata.causal,
    )
