"""The contract between a layer and its weight format: the method.

A layer holds a `quant_method`. The method creates the weights as the checkpoint stores them, converts them once to a
canonical layout, binds the best kernel for it, and applies that. `LinearMethodBase` does all of this from four things
that a format supplies: its tensors (`weight_specs`), what it refuses (`check`), and its layout both ways
(`to_canonical`, and `quantize` for use as the target of a rule).

Methods are frozen values without per-layer state: equal methods mean equal formats, so a fused layer whose parts
resolve to equal methods is one matmul. What belongs to a layer lives on the layer.
"""

# O out_features, I in_features, V vocabulary

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, on_meta
from pymllm.quantization.binding import BoundWeight, bind_for, bound_as, bound_weight
from pymllm.quantization.parameters import add_weight, layer_shape
from pymllm.quantization.slabs import bind_in_slabs
from pymllm.weights.loader import place
from pymllm.weights.spec import LinearShape, WeightSpec


def kind_of(layer: nn.Module) -> str:
    """Return the kind of a layer: "linear", "embedding", "lm_head" or "router"; a module that says none is linear."""
    return getattr(layer, "kind", "linear")


class QuantizeMethodBase(ABC):
    """The interface of every method, whatever its layer is."""

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
    """The interface of a method for linear layers: their weights in one format.  Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @abstractmethod
    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        """Describe the tensors of one layer, as the checkpoint stores them."""

    @abstractmethod
    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        """Convert this rank's tensors, by the names of `weight_specs`, to the canonical layout."""

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Quantise a float weight [O, I] to this format's canonical layout.

        ConfigError for a format that can only be read.
        """
        raise ConfigError(
            f"{self.name} can be read but not made from other weights here",
            code="not-a-target",
            tensor=shape.name,
            fix="Choose another method for this rule.",
        )

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        """Invert `to_canonical` for one part: return the checkpoint's tensors by the names of `weight_specs`.

        weight: of the kind that `to_canonical` makes.  ConfigError for a format that cannot be written.
        """
        raise ConfigError(
            f"{self.describe()} can be read but not written here",
            code="not-writable",
            tensor=shape.name,
            fix="Give the layer a rule with a method that can be written: awq, gptq, int4, int8, fp8,"
            " mxfp4, nvfp4, gguf or none.",
        )

    def check(self, shape: LinearShape) -> None:
        """Raise ConfigError for a shape or dtype that this method cannot run.  Layers call it as they are built."""

    @property
    def fuses(self) -> bool:
        """True if parts of a fused layer that all have this method can be one weight."""
        return True

    @property
    def free_scales(self) -> bool:
        """True if the integers of `quantize` can be stored with any scales: calibration chooses its own."""
        return True

    @property
    def by_outputs(self) -> bool:
        """True if `to_canonical` converts each output by itself, so that a weight may be converted in slabs."""
        return True

    @property
    def quantizes_by_outputs(self) -> bool:
        """True if `quantize` rounds each output by itself: no scale is of several outputs."""
        return False

    def describe(self) -> str:
        """Name the method with its options, for people."""
        return self.name

    def source_method(self) -> LinearMethodBase:
        """Return the method that reads the checkpoint's tensors: this one, unless a rule converts the layer."""
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
        """Bind the loaded weights to a kernel and free the checkpoint's layout.  A second call does nothing."""
        if bound_weight(layer) is None:
            shape: Any = layer.shape
            names = [spec.name for spec in self.weight_specs(shape)]
            stored = {name: getattr(layer, name).data for name in names}
            without_data = any(tensor.is_meta for tensor in stored.values())
            bound = None
            if self.by_outputs and not without_data:
                bound = bind_in_slabs(self, stored, shape, *bound_as(layer, "cpu"))
            weight = None if bound is not None else self.to_canonical(stored, shape)
            if without_data and weight is not None:  # no part of it may have data then
                weight = on_meta(weight)
            for name in names:
                delattr(layer, name)
            del stored
            if weight is not None:
                bound = bind_for(layer, weight)
            layer.bound = bound  # type: ignore[assignment]

    def planned(self, shape: LinearShape) -> CanonicalWeight:
        """Make the canonical weight of a layer of this shape without its data, on the meta device."""
        tensors = {
            spec.name: torch.empty(place(spec, shape)[0], dtype=spec.dtype, device="meta")
            for spec in self.weight_specs(shape)
        }
        return on_meta(self.to_canonical(tensors, shape))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Multiply: x [*, I_local] -> [*, O_local], all parts side by side."""
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
        """Multiply by an LM head's weight: x [*, I] -> [*, V_local]."""
        return self.apply(layer, x, bias)

    def embed(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Gather rows of an embedding.  ids: any shape, within this rank's share.  Returns [*ids.shape, I]."""
        return self._bound(layer).run(ids)


class StoredTensor(Protocol):
    """A tensor as a checkpoint's header describes it.  dtype: None for elements of less than a byte."""

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def shape(self) -> tuple[int, ...]: ...
