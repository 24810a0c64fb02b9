"""The weights that a search chooses methods for: those of a `Prepared` model, with their options."""

# O out_features, I in_features

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight
from pymllm.layers.held import HeldPart
from pymllm.loading.prepare import Prepared
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.searching.methods import Method, stored_bits
from pymllm.weights.spec import LinearShape
from pymllm.writing.layers import SourceLayer, Step, steps_of

SEARCHED = ("linear", "embedding", "lm_head")


@dataclass(frozen=True)
class SearchedWeight:
    """A weight that gets one method: all parts of a fused layer, all experts of a layer, an embedding with a tied head.

    name: of the module that holds it, or of the part where parts are on their own.  step: the index of its step.
    module: the module's name.  layers: its parts as they are stored.  tied: the names that share its table.
    shape: that of all parts together, [O, I]; None: each layer is rounded by itself.
    """

    name: str
    step: int
    module: str
    layers: tuple[SourceLayer, ...] = field(repr=False)
    tied: tuple[str, ...] = ()
    shape: LinearShape | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which rules know its parts."""
        return (*(layer.name for layer in self.layers), *self.tied)

    @property
    def count(self) -> int:
        """The number of elements."""
        return sum(layer.shape.out_features * layer.shape.in_features for layer in self.layers)

    @property
    def stored_bits(self) -> int:
        """The bits that its tensors take in the checkpoint."""
        return 8 * sum(layer.nbytes for layer in self.layers)

    @property
    def plain(self) -> bool:
        """True where the checkpoint stores floats."""
        return all(isinstance(layer.source, UnquantizedLinearMethod) for layer in self.layers)

    def shapes(self) -> list[LinearShape]:
        """Return the shapes that are rounded: one, or one for each layer."""
        return [layer.shape for layer in self.layers] if self.shape is None else [self.shape]

    def bits_in(self, method: Method) -> int | None:
        """Count the bits that it takes in a method; None: the method cannot hold it."""
        if method.target is None:
            return self.stored_bits
        bits = 0
        try:
            for shape in self.shapes():
                method.target.check(shape)
                bits += stored_bits(plan_weight(method.target, shape), len(shape.outputs))
        except ConfigError as error:
            if error.code in ("not-a-target", "needs-calibration"):
                raise  # whatever the weight is
            return None
        return bits

    def rounded(self, method: Method, floats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round its parts as loading by a rule would, and decode them.

        floats: [O, I] float32 by layer name.  Returns the same, rounded.
        """
        target = method.target
        if target is None:
            return {layer.name: floats[layer.name] for layer in self.layers}
        if self.shape is None:
            return {
                layer.name: _decode(target.quantize(floats[layer.name].clone(), layer.shape))
                for layer in self.layers
            }
        together = torch.cat([floats[layer.name] for layer in self.layers])
        parts = _decode(target.quantize(together, self.shape)).split(
            [floats[layer.name].shape[0] for layer in self.layers]
        )
        return {layer.name: part for layer, part in zip(self.layers, parts, strict=True)}


def plan_weight(target: LinearMethodBase, shape: LinearShape) -> CanonicalWeight:
    """Make what a method makes of a weight of this shape, without data."""
    return _plan_weight(target, replace(shape, parts=("",) * len(shape.parts)))


@functools.lru_cache(maxsize=4096)
def _plan_weight(target: LinearMethodBase, shape: LinearShape) -> CanonicalWeight:
    meta = torch.empty((shape.out_features, shape.in_features), device="meta")
    return target.quantize(meta, shape)


def _decode(weight: CanonicalWeight) -> Tensor:
    return weight.dequantize(torch.float32)


def list_weights(
    prepared: Prepared, *, keep_fused: bool
) -> tuple[list[Step], list[SearchedWeight], list[SourceLayer]]:
    """Divide a model into steps and list its weights.

    keep_fused: whether parts that run in one product get one method.
    Returns the steps in order, the weights, and the layers that keep what they are (routers).
    ConfigError for experts that lie in one tensor: they cannot be run one by one.
    """
    for unit in prepared.units:
        stacked = next((part for part in unit.holder.parts() if part.stacked), None)
        if stacked is not None:
            raise ConfigError(
                "all experts of a layer lie in one tensor, and a search cannot run through such experts",
                code="search-model",
                tensor=stacked.name,
                expected="experts with tensors of their own, as experts.0.up_proj",
                fix="Choose rules by hand, and compare them: `pymllm verify MODEL --compare RULES RULES --text FILE`.",
            )
    steps = steps_of(prepared)
    tied: dict[str, list[str]] = {}
    for unit in prepared.units:
        if unit.holder.borrows_from is not None:
            for part in unit.holder.parts():
                tied.setdefault(part.stored, []).append(part.name)
    weights: list[SearchedWeight] = []
    left: list[SourceLayer] = []
    for index, step in enumerate(steps):
        known = {layer.name: layer for layer in step.layers}
        for unit in step.units:
            parts: Sequence[HeldPart] = [part for part in unit.holder.parts() if part.name in known]
            layers = [known[part.name] for part in parts]
            if not layers:
                continue
            if any(layer.kind not in SEARCHED for layer in layers):
                left += layers
                continue
            experts = any(part.kind == "experts" for part in parts)
            if keep_fused or experts or len(layers) == 1:
                whole = None if experts else getattr(unit.holder, "shape", None)
                shares = tuple(tied.get(layers[0].name, ()))
                weights.append(SearchedWeight(unit.name, index, unit.name, tuple(layers), shares, whole))
            else:
                weights += [SearchedWeight(layer.name, index, unit.name, (layer,)) for layer in layers]
    return steps, weights, left
