"""The golden vectors of every format, found by themselves, and layers loaded from their tensors."""

# O out_features, I in_features

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pymllm.kernels.canonical import CanonicalWeight
from pymllm.layers.linear import Linear, LinearBase
from pymllm.layers.split import SplitLinearMethod
from pymllm.parallel import Parallel
from pymllm.quantization.base import get_quantization_config
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import Axis, LinearShape, Span, WeightSpec

ROOT = Path(__file__).parents[2] / "quantization"
NOT_STORED = ("weight_float", "dequantized")  # what a file holds beside the checkpoint's own tensors


@dataclass(frozen=True)
class Vector:
    """One golden vector: a layer's tensors as the format's writer stored them."""

    path: Path

    @cached_property
    def _content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            return json.loads(file.metadata()["case"]), tensors

    @property
    def case(self) -> dict[str, Any]:
        return self._content[0]

    @property
    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by suffix."""
        return {name: tensor for name, tensor in self._content[1].items() if name not in NOT_STORED}

    @property
    def dequantized(self) -> Tensor:
        """[O, I] float32, by the writer, rounded to `rounded_to` on its way."""
        return self._content[1]["dequantized"]

    @property
    def rounded_to(self) -> torch.dtype:
        return getattr(torch, self.case["dequantized_rounded_to"])

    @property
    def out_features(self) -> int:
        return self.case["out_features"]

    @property
    def in_features(self) -> int:
        return self.case["in_features"]

    @cached_property
    def method(self) -> LinearMethodBase:
        """What the format's config makes of a layer with these tensors."""
        settings = self.case["quantization_config"]
        config = get_quantization_config(settings["quant_method"]).from_config(settings)
        config.see_checkpoint({f"model.layer.{name}": tensor for name, tensor in self.stored.items()})
        method = config.get_quant_method(SimpleNamespace(kind="linear"), "model.layer")
        assert method is not None, "the config leaves the layer unquantised"
        return method

    @property
    def shape(self) -> LinearShape:
        """The layer, on one rank."""
        return shape_of(self.in_features, self.out_features)

    @cached_property
    def canonical(self) -> CanonicalWeight:
        """Through the method alone, without a kernel."""
        return canonical_of(self.layer())

    def layer(self, dtype: torch.dtype = torch.float32) -> LinearBase:
        """A layer with these tensors, not packed yet."""
        sizes = self.in_features, self.out_features
        tensors = {spec.name: self.stored_for(spec) for spec in self.method.weight_specs(self.shape)}
        return load_layer(
            lambda: Linear(*sizes, False, self.method, prefix="model.layer", params_dtype=dtype), [tensors]
        )

    def stored_for(self, spec: WeightSpec) -> Tensor:
        """The stored tensor that a spec means, under any of its names."""
        return next(self.stored[name] for name in (spec.name, *spec.aliases) if name in self.stored)

    def resampled(self, in_features: int, out_features: int, seed: int) -> dict[str, Tensor]:
        """Tensors of another shape, by spec name, whose every element is one of this vector's: no two places alike.

        Those that follow no axis of the layer and keep their shape (a codebook, say) are as they were.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for spec in self.method.weight_specs(shape_of(in_features, out_features)):
            source, shape = self.stored_for(spec), spec.source_shape(in_features, out_features)
            follows = any(dim.axis in (Axis.IN, Axis.OUT) for dim in spec.dims)
            if not follows and (tuple(source.shape) == shape or source.numel() == 1):
                tensors[spec.name] = source
            else:
                # Whole blocks where a format has them: their bytes mean something only side by side.
                block = spec.dims[-1].count if source.dtype is torch.uint8 else 1
                pool = source.reshape(-1, block)
                picked = torch.randint(0, len(pool), (*shape[:-1], shape[-1] // block), generator=generator)
                tensors[spec.name] = pool[picked].flatten(-2)
        return tensors

    @property
    def coarseness(self) -> int:
        """How many times 64 inputs a rank's share must be at least, and a multiple of: blocks can be as long as 256."""
        dims = [dim for spec in self.method.weight_specs(self.shape) for dim in spec.dims]
        granules = [d.of_rows(self.in_features).granule for d in dims if d.axis is Axis.IN and d.apart]
        return max(1, max(granules, default=1) // 64)


def shape_of(in_features: int, out_features: int) -> LinearShape:
    """An unsharded layer of this size."""
    return LinearShape(Span.full(in_features), (Span.full(out_features),), ("model.layer",), torch.float32)


@cache
def all_vectors() -> tuple[Vector, ...]:
    return tuple(Vector(path) for path in sorted(ROOT.glob("*/golden/*.safetensors")))


def name_of(vector: Vector) -> str:
    return vector.path.stem


def one_of_each_method() -> list[Vector]:
    """The first vector of every distinct method."""
    first: dict[LinearMethodBase, Vector] = {}
    for vector in all_vectors():
        first.setdefault(vector.method, vector)
    return list(first.values())


def load_layer(
    make: Callable[[], LinearBase], parts: Sequence[dict[str, Tensor]], parallel: Parallel | None = None
) -> LinearBase:
    """A layer made under `parallel`, filled through its weight_loader; not packed yet.

    parts: for each fused part, its full checkpoint tensors by spec name.
    """
    with parallel or Parallel():
        layer = make()
    for index, tensors in enumerate(parts):
        for name, tensor in tensors.items():
            layer.weight_loader(getattr(layer, name), tensor, index)
    return layer


def fill_layer(
    make: Callable[[], LinearBase], parts: Sequence[dict[str, Tensor]], parallel: Parallel | None = None
) -> LinearBase:
    """Make a layer under `parallel`, load each part's tensors and pack it; parts that are kept apart, one by one."""
    with parallel or Parallel():
        layer = make()
    split = isinstance(layer.quant_method, SplitLinearMethod)
    for index, tensors in enumerate(parts):
        holder = layer.quant_method.holders(layer)[index] if split else layer
        for name, tensor in tensors.items():
            holder.weight_loader(getattr(holder, name), tensor, None if split else index)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def canonical_of(layer: LinearBase) -> CanonicalWeight:
    """A loaded layer's weight, without a kernel."""
    return layer.quant_method.to_canonical(
        {name: p.data for name, p in layer.named_parameters()}, layer.shape
    )


def weight_of(layer: LinearBase) -> Tensor:
    """[O_local, I_local] float64: what a loaded layer means."""
    return canonical_of(layer).dequantize(torch.float64)
