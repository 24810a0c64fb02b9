"""The KV cache's methods: how an attention layer stores its keys and values.

An `Attention` layer holds one as its `quant_method`, as a linear layer holds its own. `KVType` gives the layouts of
the pages:

    none                          floats, in the activations' dtype or another one (`Execution.kv_dtype`)
    fp8, int8 (static scales)     e4m3 or int8, value = code * scale; the checkpoint gives one scale for keys and one
                                  for values, or one for each head; 1 where it has none
    int8, fp8 (scales of tokens)  value = code * scale; a float32 scale beside every head of every token
"""

# N slots, T tokens, Hkv key heads, D head size, Dv value head size, P page size

from __future__ import annotations

import math
import mmap
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, counted, unknown_name
from pymllm.kernels.attention import AttentionStep, KVType, PagedKV, Scaling
from pymllm.kernels.registry import select
from pymllm.quantization.method import QuantizeMethodBase, StoredTensor
from pymllm.quantization.options import one_of, parse_options
from pymllm.quantization.parameters import add_weight
from pymllm.quantization.storage.fields import read_stored, refuse_other_than_zeros
from pymllm.weights.report import Skip
from pymllm.weights.spec import FLOATS, OUT, PART, LinearShape, WeightSpec, whole

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
# From where on `zeros` leaves it to the system to commit memory.
LAZY_BYTES = 1 << 20

# After the attention module's name, as compressed-tensors, ModelOpt, AutoFP8, Quark and vLLM write them.
KEY_SCALES = ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "qkv_proj.k_scale", "attn.k_scale")
VALUE_SCALES = ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "qkv_proj.v_scale", "attn.v_scale")
COMMON_SCALES = ("kv_scale", "attn.kv_scale")  # one for both
QUERY_SCALES = ("q_scale", "q_proj.q_scale", "q_proj.output_scale", "qkv_proj.q_scale", "attn.q_scale")
PROBABILITY_SCALES = ("prob_scale", "attn.prob_scale", "prob_output_scale")


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor of zeros; the system commits the memory of a large one on a CPU page by page, as it is used.

    torch.zeros writes all of it at once: 4 GB for a context of 8192 tokens of a model of 7 B parameters.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LAZY_BYTES:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Windows has no such flag, and no processes that fork.
    flags = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, nbytes, **flags)
    except OSError as error:
        raise ConfigError(
            "the KV cache is larger than the memory that the system gives",
            code="out-of-memory",
            expected=f"{counted(nbytes, 'byte')} for a layer's keys or values",
            found=error.strerror or str(error),
            fix="Choose a shorter context (--max-model-len), or a smaller cache (--kv-memory 1GB).",
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _zero_points(scales: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.removesuffix("scale") + "zero_point" for name in scales)


class KVCacheMethodBase(QuantizeMethodBase):
    """The interface of a KV cache method: one layer's cache in one storage type.  Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @abstractmethod
    def kv_type(self, dtype: torch.dtype) -> KVType:
        """Return how keys and values of this dtype are stored."""

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        """Describe the checkpoint's tensors.  shape: the layer's, whose outputs are key heads."""
        return ()

    def create_weights(self, layer: nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        """Register one parameter for each tensor, with its loader metadata."""
        shape: Any = layer.shape
        for spec in self.weight_specs(shape):
            add_weight(layer, spec, shape, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Spread the loaded scales over this rank's key heads.  A second call does nothing."""
        shape: Any = layer.shape
        names = [spec.name for spec in self.weight_specs(shape)]
        if names and hasattr(layer, names[0]):
            scales = [getattr(layer, name).data.float().flatten() for name in names]
            layer.kv_scales = tuple(s.expand(shape.out_features_local).contiguous() for s in scales)  # type: ignore[assignment]
            for name in names:
                delattr(layer, name)

    def allocate(self, layer: Any, num_pages: int, page_size: int, device: torch.device) -> PagedKV:
        """Make empty pages for the layer.  num_pages, page_size: how many pages, and slots in each."""
        kind: KVType = layer.problem.kv
        slots = (num_pages, page_size, layer.num_kv_heads)
        scales: list[Tensor | None] = [None, None]
        if kind.scaling == "token":
            scales = [zeros(slots, torch.float32, device) for _ in scales]
        elif kind.scaling == "static":
            ones = torch.ones(layer.num_kv_heads, device=device)
            scales = [s.to(device) for s in (layer.kv_scales or (ones, ones))]
        return PagedKV(
            kind,
            zeros((*slots, layer.head_dim), kind.dtype, device),
            zeros((*slots, layer.value_head_dim), kind.dtype, device),
            *scales,
        )

    def store(self, layer: Any, k: Tensor, v: Tensor, step: AttentionStep) -> None:
        """Write new keys and values to their slots, and skip slots below 0.  k: [T, Hkv, D], v: [T, Hkv, Dv]."""
        layer.store_selection.kernel.run(layer.problem, k, v, layer.cache, step)

    def load(self, layer: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Read slots [N] of the flattened pages, in the activations' dtype.  Returns [N, Hkv, D] and [N, Hkv, Dv]."""
        return layer.cache.read(slots, layer.problem.dtype)

    @property
    def stores_in_place(self) -> bool:
        """True where nothing but the layer's kernel takes part in storing, so that `apply` may get a `rotation`."""
        own, ours = type(self), KVCacheMethodBase
        return own.apply is ours.apply and own.store is ours.store

    def apply(  # type: ignore[override]
        self,
        layer: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: AttentionStep,
        sinks: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Store the step's keys and values, then attend.  Shapes as of `AttentionKernel.run`.  Returns [T, H, Dv].

        A step that caches nothing attends to keys and values that are rounded as the cache would round them.
        rotation: cosines and sines by which the kernel that stores rotates q and k; see `Attention.rotates_as`.
        """
        problem, kernel = layer.problem, layer.selection.kernel
        cache = None if step.page_tables is None else layer.cache
        if rotation is not None:
            q = layer.store_selection.kernel.rotate_and_store(problem, q, k, v, cache, step, *rotation)
        elif cache is not None and step.need_kv_cache_store:
            self.store(layer, k, v, step)
        elif cache is None and not problem.kv.keeps(k.dtype):
            k, v = self.as_stored(layer, k, v)
        if not step.causal and not problem.block_causal:
            problem = replace(problem, block_causal=True)
            kernel = select("attention", problem, layer.forced).kernel
        return kernel.run(problem, q, k, v, step, cache, sinks)

    def as_stored(self, layer: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values as they would come back from pages, for steps that cache nothing."""
        tokens = k.shape[0]
        pages = self.allocate(layer, 1, tokens, k.device)
        slots = torch.arange(tokens, device=k.device)
        layer.store_selection.kernel.run(layer.problem, k, v, pages, AttentionStep(slot_mapping=slots))
        return pages.read(slots, k.dtype)

    def describe(self) -> str:
        """Name the method with its options, for people."""
        return self.name


@dataclass(frozen=True)
class UnquantizedKVCacheMethod(KVCacheMethodBase):
    """A cache in plain floats.  dtype: of the pages; None: the activations' own."""

    dtype: torch.dtype | None = None
    name: ClassVar[str] = "none"

    def kv_type(self, dtype: torch.dtype) -> KVType:
        return KVType(self.dtype or dtype)

    def describe(self) -> str:
        return "activations' dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class QuantizedKVCacheMethod(KVCacheMethodBase):
    """A cache of eight bits for each value.

    kind: the codes' type.  scaling: "static": scales that do not change; "token": one for each head of each token.
    stored: which static scales the checkpoint has: one for the tensor, one for each key head, or none, which means 1.
    """

    kind: Literal["fp8", "int8"]
    scaling: Scaling = "static"
    stored: Literal["none", "tensor", "head"] = "none"

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.kind

    def kv_type(self, dtype: torch.dtype) -> KVType:
        return KVType(DTYPES[self.kind], self.scaling)

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        if self.scaling != "static" or self.stored == "none":
            return ()
        dims = (PART,) if self.stored == "tensor" else (OUT, whole(1), whole(1))
        return tuple(
            WeightSpec(first, torch.float32, dims, accepts=FLOATS, aliases=tuple(others), scale=True)
            for first, *others in ((*KEY_SCALES, *COMMON_SCALES), (*VALUE_SCALES, *COMMON_SCALES))
        )

    def with_stored_scales(
        self, stored: Mapping[str, StoredTensor], prefix: str, num_kv_heads: int
    ) -> QuantizedKVCacheMethod:
        """Return the same method with the scales that the checkpoint has for the attention module `prefix`."""
        names = (f"{prefix}.{name}" for name in (*KEY_SCALES, *VALUE_SCALES, *COMMON_SCALES))
        found = next((stored[name] for name in names if name in stored), None)
        if self.scaling != "static" or found is None:
            return self
        per_head = len(found.shape) == 3 and found.shape[0] == num_kv_heads and num_kv_heads > 1
        return replace(self, stored="head" if per_head else "tensor")

    def describe(self) -> str:
        scales = {"none": "scale 1", "tensor": "a scale from the checkpoint", "head": "a scale a head"}
        codes = {"fp8": "fp8 e4m3", "int8": "int8"}[self.kind]
        return f"{codes}, {'a scale a token and head' if self.scaling == 'token' else scales[self.stored]}"


KV_METHODS = ("auto", "none", "fp8", "int8", "float32", "bfloat16", "float16")


def build_kv_method(name: str, options: Mapping[str, str]) -> KVCacheMethodBase | None:
    """Make the method that a user asks for, or return None for "auto", which is the checkpoint's own.

    fp8 has static scales from the checkpoint, int8 a scale for each head of each token; the option `scale` (checkpoint
    or token) says otherwise.  ConfigError for an unknown method or option.
    """
    if name in DTYPES:
        kind: Any = name
        default = "checkpoint" if name == "fp8" else "token"
        scale = parse_options(name, options, {"scale": one_of("checkpoint", "token")}).get("scale", default)
        return QuantizedKVCacheMethod(kind, "token" if scale == "token" else "static")
    if name not in KV_METHODS:
        raise unknown_name("KV cache method", name, KV_METHODS, code="unknown-method")
    parse_options(name, options, {})
    if name == "auto":
        return None
    return UnquantizedKVCacheMethod(None if name == "none" else getattr(torch, name))


def skip_kv_tensor(
    method: KVCacheMethodBase, name: str, module: str, stored: Mapping[str, StoredTensor]
) -> Skip | str | None:
    """Return why a tensor of an attention module may be skipped, or None if it is not of the KV cache.

    method: how the module's keys and values are stored.  name: after the module's, `module`, which ends with a dot.
    """
    if name in (*QUERY_SCALES, *_zero_points(QUERY_SCALES)):
        return "a scale of queries beside the KV cache, which stay in floats"
    if name in PROBABILITY_SCALES:
        return "a scale of attention probabilities, which stay in floats"
    if name in _zero_points((*KEY_SCALES, *VALUE_SCALES, *COMMON_SCALES)):
        return Skip(
            "a zero point of the KV cache's symmetric quantisation, which has none", refuse_other_than_zeros
        )
    kinds = [kind for kind in (KEY_SCALES, VALUE_SCALES, COMMON_SCALES) if name in kind]
    if not kinds:
        return None
    if not isinstance(method, QuantizedKVCacheMethod):
        return "a scale of the KV cache, which is kept in floats"
    if method.scaling == "token":
        return "a scale of the KV cache, which has a scale for each head of each token instead"
    scales = (*VALUE_SCALES, *COMMON_SCALES) if name in VALUE_SCALES else (*KEY_SCALES, *COMMON_SCALES)
    used = next(f"{module}{scale}" for scale in scales if f"{module}{scale}" in stored)

    def refuse(found: Tensor) -> str | None:
        read = read_stored(stored[used]).float().flatten()
        same = torch.equal(found.float().flatten().cpu(), read)
        return None if same else f"{found.flatten().tolist()[:4]}, where {used} has {read.tolist()[:4]}"

    return Skip(f"the scale of the KV cache once more, beside {used.removeprefix(module)}", refuse)


def unsupported_kv_cache(field: str, value: Any, supported: str) -> ConfigError:
    """Make the error for a KV cache scheme of the checkpoint that no method here implements."""
    name = field.rpartition(".")[2]
    return ConfigError(
        f"the checkpoint asks for a KV cache with {name} {value!r}, for which there is no method",
        code="quantization-config",
        file="config.json",
        tensor=f"quantization_config.{field}",
        expected=supported,
        found=repr(value),
        fix="Choose a method yourself: kv_cache='none' (--kv-cache none) keeps keys and values in floats.",
    )


def read_kv_scheme(scheme: Any) -> KVCacheMethodBase | None:
    """Read `kv_cache_scheme` of compressed-tensors and others: type, num_bits, strategy, dynamic and symmetric.

    None: the checkpoint has no scheme.  ConfigError for one that no method implements.
    """
    if scheme is None:
        return None
    at = "kv_cache_scheme"
    if not isinstance(scheme, Mapping):
        raise unsupported_kv_cache(at, scheme, "null, or an object")
    kind = {("float", 8): "fp8", ("int", 8): "int8"}.get((scheme.get("type"), scheme.get("num_bits")))  # type: ignore[arg-type]
    if kind is None:
        raise unsupported_kv_cache(
            at, {k: scheme.get(k) for k in ("type", "num_bits")}, "type float or int, num_bits 8"
        )
    if scheme.get("symmetric", True) is not True:
        raise unsupported_kv_cache(f"{at}.symmetric", scheme["symmetric"], "true")
    if scheme.get("dynamic", False) is not False:
        raise unsupported_kv_cache(f"{at}.dynamic", scheme["dynamic"], "false")
    if scheme.get("strategy", "tensor") not in ("tensor", "attn_head", None):
        raise unsupported_kv_cache(f"{at}.strategy", scheme["strategy"], "tensor or attn_head")
    return QuantizedKVCacheMethod(kind)  # type: ignore[arg-type]
