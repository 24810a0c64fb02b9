"""The contract between a layer and its weight format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, on_meta
from pymllm.quantization.binding import BoundWeight, bind_layer, bound_weight
from pymllm.quantization.parameters import add_weight, layer_shape
from pymllm.weights.loader import place
from pymllm.weights.spec import LinearShape, WeightSpec


def kind_of(layer: nn.Module) -> str:
    """Return the kind of a layer: "linear", "embedding", "lm_head" or "router"; a module that says none is linear."""
    return getattr(layer, "kind", "linear")


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


class StoredTensor(Protocol):
    """What a checkpoint's header says of a tensor."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...
