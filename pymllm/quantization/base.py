"""The contract between layers and weight formats.

A layer holds a `quant_method`. The method creates the weights as the checkpoint stores them, converts them once to a
canonical layout, binds the best kernel for it, and applies that. `LinearMethodBase` does all of this from four things
that a format supplies: its tensors (`weight_specs`), what it refuses (`check`), and its layout both ways
(`to_canonical`, and `quantize` for use as the target of a rule).

Methods are frozen values without per-layer state: equal methods mean equal formats, so a fused layer whose parts
resolve to equal methods is one matmul. What belongs to a layer lives on the layer.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError, fetch_factory_name, nearest
from pymllm.kernels.canonical import CanonicalWeight, DenseWeight, on_meta
from pymllm.quantization.binding import BoundWeight, bind_layer, bound_weight
from pymllm.weights.loader import Written, copy_full_tensor, place
from pymllm.weights.spec import FLOATS, IN, OUT, LinearShape, Span, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

    from pymllm.quantization.kv_cache import KVCacheMethodBase


class QuantizeMethodBase(ABC):
    """What a layer asks of its method, whatever the layer is."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        """Register the layer's parameters, as the checkpoint stores them."""

    @abstractmethod
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Convert and pack the loaded weights, once, and free what is no longer needed."""

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any) -> Tensor:
        """Run the layer on packed weights."""


class LinearMethodBase(QuantizeMethodBase):
    """A linear layer's weights in one format.  Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @abstractmethod
    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        """The tensors of one layer, as the checkpoint stores them."""

    @abstractmethod
    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        """This rank's tensors, by the names of `weight_specs`, in the canonical layout."""

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """A float weight [O, I] in this format's canonical layout.  ConfigError where that is not defined."""
        raise ConfigError(
            f"{self.name} can be read but not made from other weights here",
            code="not-a-target",
            tensor=shape.name,
            fix="Choose another method for this rule.",
        )

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        """The inverse of `to_canonical` for one part: the checkpoint's tensors by the names of `weight_specs`.

        `weight` must be of the kind that `to_canonical` makes.  ConfigError where writing is not defined.
        """
        raise ConfigError(
            f"{self.describe()} can be read but not written here",
            code="not-writable",
            tensor=shape.name,
            fix="Give the layer a rule with a method that can be written: awq, int4, int8, fp8 or none.",
        )

    def check(self, shape: LinearShape) -> None:
        """Refuse, at construction, a shape or dtype that this method cannot run.  ConfigError."""

    @property
    def fuses(self) -> bool:
        """Whether parts of a fused layer that all have this method can be one weight."""
        return True

    def describe(self) -> str:
        """The method with its options, for people."""
        return self.name

    def source_method(self) -> LinearMethodBase:
        """The method that reads the checkpoint's tensors; another one only where a rule converts."""
        return self

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register one parameter for each tensor of the format, with its loader metadata."""
        shape = layer_shape(
            layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        )
        self.check(shape)
        for spec in self.weight_specs(shape):
            add_weight(layer, spec, shape, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bind the loaded weights to a kernel; the checkpoint's layout is freed.  A second call does nothing."""
        if bound_weight(layer) is None:
            shape: Any = layer.shape
            names = [spec.name for spec in self.weight_specs(shape)]
            weight = self.to_canonical({name: getattr(layer, name).data for name in names}, shape)
            for name in names:
                delattr(layer, name)
            bind_layer(layer, weight)

    def planned(self, shape: LinearShape) -> CanonicalWeight:
        """The canonical weight without its data, on the meta device."""
        tensors = {
            spec.name: torch.empty(place(spec, shape)[0], dtype=spec.dtype, device="meta")
            for spec in self.weight_specs(shape)
        }
        return on_meta(self.to_canonical(tensors, shape))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x: [*, I_local].  Returns [*, O_local] (all parts side by side)."""
        return self._bound(layer).run(x, bias)

    @staticmethod
    def _bound(layer: nn.Module) -> BoundWeight:
        bound = bound_weight(layer)
        if bound is None:
            raise ConfigError(
                "the layer's weights are not packed yet",
                code="not-packed",
                tensor=getattr(layer, "prefix", None),
                fix="Load them, then call quant_method.process_weights_after_loading(layer).",
            )
        return bound

    def logits(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """An LM head's product.  x: [*, I].  Returns [*, V_local]."""
        return self.apply(layer, x, bias)

    def embed(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Rows of an embedding.  ids: any shape, within this rank's share.  Returns [*ids.shape, I]."""
        return self._bound(layer).run(ids)


def layer_shape(
    layer: nn.Module,
    in_local: int,
    out_local: list[int],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> LinearShape:
    """The layer's own shape, or, for a bare module, one made of the sizes: unsharded, or the first rank's share."""
    if not hasattr(layer, "shape"):
        total = sum(out_local)
        outputs = tuple(
            Span(0, size, size * out_features // total if out_features % total == 0 else size)
            for size in out_local
        )
        layer.shape = LinearShape(  # type: ignore[assignment]
            Span(0, in_local, in_features), outputs, tuple("" for _ in out_local), dtype
        )
    return layer.shape  # type: ignore[return-value]


def add_weight(layer: nn.Module, spec: WeightSpec, shape: LinearShape, **attrs: Any) -> None:
    """Register the parameter for `spec` on `layer`, ready for `weight_loader`: zeros where the share is padded."""
    local, slots = place(spec, shape)
    padded = sum(slot.elements for slot in slots) != math.prod(local)
    param = nn.Parameter(
        (torch.zeros if padded else torch.empty)(local, dtype=spec.dtype), requires_grad=False
    )
    layer.register_parameter(spec.name, param)
    loader = {"weight_loader": layer.weight_loader} if hasattr(layer, "weight_loader") else {}
    set_weight_attrs(param, {"slots": slots, "written": Written(), **loader, **attrs})


def set_weight_attrs(param: Tensor, attrs: Mapping[str, Any] | None) -> None:
    """Attach loader metadata to a parameter.  Overwriting an attribute is an error."""
    for key, value in (attrs or {}).items():
        if hasattr(param, key):
            raise ConfigError(
                f"the parameter already has the attribute {key!r}",
                code="attribute-overwritten",
                fix="Give loader metadata names that torch.Tensor does not use, each once.",
            )
        setattr(param, key, value)


def load_into(param: Tensor, loaded: Tensor, part: int | None, layer: str) -> None:
    """`weight_loader` for every layer: cut `loaded` (a full checkpoint tensor) for this rank and write it once."""
    copy_full_tensor(param.data, param.slots, loaded, param.written, part, layer)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class UnquantizedLinearMethod(LinearMethodBase):
    """Plain float weights.

    transposed: stored [I, O], as some checkpoints have the experts of a layer.
    dtype: in which they are held, for kernels that widen them as they go; None: the layer's own.
    """

    transposed: bool = False
    dtype: torch.dtype | None = None
    name: ClassVar[str] = "none"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        dims = (IN, OUT) if self.transposed else (OUT, IN)
        return (WeightSpec("weight", self.dtype or shape.dtype, dims, accepts=FLOATS),)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        weight = tensors["weight"]
        return DenseWeight(weight.t().contiguous() if self.transposed else weight)

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        return DenseWeight(weight.to(self.dtype or shape.dtype))

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, DenseWeight)
        return {"weight": weight.weight.contiguous()}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if bound_weight(layer) is None:  # a layer used on its own, never packed
            return nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]
        return super().apply(layer, x, bias)

    def embed(self, layer: nn.Module, ids: Tensor) -> Tensor:
        if bound_weight(layer) is None:
            return nn.functional.embedding(ids, layer.weight)  # type: ignore[arg-type]
        return super().embed(layer, ids)


@dataclass(frozen=True)
class ConvertedLinearMethod(LinearMethodBase):
    """Reads the checkpoint's format and runs another one: decoded and encoded once, layer by layer, while loading."""

    source: LinearMethodBase
    target: LinearMethodBase

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.target.name

    @property
    def fuses(self) -> bool:
        return self.source.fuses

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        return self.source.weight_specs(shape)

    def check(self, shape: LinearShape) -> None:
        self.source.check(shape)
        self.target.check(shape)

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        return self.convert(self.source.to_canonical(tensors, shape), shape)

    def convert(self, weight: CanonicalWeight, shape: LinearShape) -> CanonicalWeight:
        """A weight of the source format in the target's."""
        return self.target.quantize(weight.dequantize(torch.float32), shape)

    def describe(self) -> str:
        return f"{self.target.describe()} (from {self.source.describe()})"

    def source_method(self) -> LinearMethodBase:
        return self.source


class StoredTensor(Protocol):
    """What a checkpoint's header says of a tensor."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class QuantizationConfig(ABC):
    """A checkpoint's `quantization_config`, read: which method each layer has, by its checkpoint name."""

    @classmethod
    @abstractmethod
    def get_name(cls) -> str:
        """The `quant_method` spelling this class reads."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `quantization_config`.  ConfigError names the field, its value and what is supported."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of the layer with this (unfused) checkpoint name; None: not quantised."""

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> LinearMethodBase:
        """The method that a rule `pattern=name:key=value,...` asks for.  ConfigError for an unknown option."""
        raise ConfigError(
            f"{cls.get_name()} cannot be the method of a rule",
            code="not-a-target",
            fix="Choose another method.",
        )

    def get_kv_cache_method(self, layer: nn.Module, prefix: str) -> KVCacheMethodBase | None:
        """How the attention module `prefix` is to store keys and values; None: the checkpoint does not say."""
        return None

    def see_checkpoint(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Told once, before any layer is made, what the checkpoint's headers hold; for what a config leaves open."""
        self.stored = tensors
        self.stored_modules = frozenset(name.rpartition(".")[0] for name in tensors)

    stored: Mapping[str, StoredTensor] = MappingProxyType({})
    stored_modules: frozenset[str] = frozenset()  # what the stored tensors belong to

    def stored_as_float(self, prefix: str) -> bool:
        """Whether the checkpoint holds this layer's weight as plain floats, whatever its config says of it."""
        weight = self.stored.get(f"{prefix}.weight")
        return weight is not None and weight.dtype in FLOATS

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least CUDA compute capability (80 is 8.0) that the format needs; 0: none, the reference runs anywhere."""
        return 0

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """Files beside config.json that may hold the settings of this format."""
        return []

    def skip_reason(self, tensor: str) -> str | None:
        """Why a tensor which no layer asks for may be skipped; None: it may not."""
        return None


_registry: dict[str, type[QuantizationConfig]] = {}
C = TypeVar("C", bound=type[QuantizationConfig])


def register_quantization(name: str) -> Callable[[C], C]:
    """Class decorator: make a `QuantizationConfig` known by `name`.  ValueError if the name is taken."""

    def register(cls: C) -> C:
        if name in _registry:
            raise ConfigError(
                f"the quantisation method {name!r} is registered already, by {fetch_factory_name(_registry[name])}",
                code="duplicate-method",
                fix="Choose another name.",
            )
        _registry[name] = cls
        return cls

    return register


def get_quantization_config(name: str) -> type[QuantizationConfig]:
    """The format registered under `name`.  An unknown name is an error that lists what there is."""
    known = list_quantization_methods()
    if name not in _registry:
        raise ConfigError(
            f"unknown quantisation method {name!r}",
            code="unknown-method",
            expected=" or ".join(known),
            found=name,
            fix=nearest(str(name), known)
            or "This format is not supported; the layer would not be read as it is.",
        )
    return _registry[name]


def list_quantization_methods() -> list[str]:
    """The names of all formats, those of `quantization/formats/` included."""
    from pymllm.quantization.formats import load_formats

    load_formats()
    return sorted(_registry)


def needs_calibration(method: str, shape: LinearShape) -> ConfigError:
    """The error for activation scales that no weight can tell."""
    return ConfigError(
        f"{method} has scales for activations, which only example inputs can tell",
        code="needs-calibration",
        tensor=shape.name,
        fix="Calibrate (`pymllm quantize --calibrate FILE`, quantize_model(calibration=...)), "
        "or choose activations=token.",
    )


def parse_options(
    name: str, options: Mapping[str, str], allowed: Mapping[str, Callable[[str], Any]]
) -> dict[str, Any]:
    """Read a rule's options with one converter each.  ConfigError for an unknown one or a bad value."""
    values = {}
    for key, text in options.items():
        if key not in allowed:
            raise ConfigError(
                f"{name} has no option {key!r}",
                code="unknown-option",
                expected=" or ".join(allowed),
                found=key,
                fix=nearest(key, allowed),
            )
        try:
            values[key] = allowed[key](text)
        except ValueError as error:
            raise ConfigError(
                f"{name}: the option {key} cannot be {text!r}", code="bad-option", found=text, fix=str(error)
            ) from None
    return values


def one_of(*choices: str) -> Callable[[str], str]:
    """A converter for `parse_options` that takes one of a few words."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError(f"Choose one of {', '.join(choices)}.")
        return text

    return convert
