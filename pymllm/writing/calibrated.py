"""Steps made with calibration text: the model runs over it in float32, a block at a time, while it is quantised.

A block is decoded, its layers are quantised in the order in which they run, and the decoded new weight of each one
takes the place of the old one, so that those after it are fitted to what will really reach them. What then leaves the
block is the input of the next one; it is all that is kept of the blocks before.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.errors import ConfigError, choices, counted, nearest
from pymllm.kernels.canonical import CanonicalWeight, relative_error
from pymllm.loading.prepare import Prepared
from pymllm.quantization.rounding.calibrated import InputStatistics, needs_inputs, quantize_calibrated
from pymllm.text.windows import Windows
from pymllm.writing.encoding import encode, fitted
from pymllm.writing.float_model import FloatModel, FloatStep
from pymllm.writing.input_scales import fold_input_scales
from pymllm.writing.layers import SourceLayer, Step

ALGORITHMS = ("awq", "gptq")


@dataclass(frozen=True)
class Calibration:
    """The text and the algorithm to calibrate with.

    windows: token ids, each window a text of its own.  algorithm: "awq" or "gptq".
    act_order: whether gptq rounds the inputs that matter most first.  source: a name of the text, for the model card.
    """

    windows: Windows
    algorithm: str
    act_order: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(
                "unknown calibration algorithm",
                code="calibration",
                expected=choices(ALGORITHMS),
                found=self.algorithm,
                fix=nearest(str(self.algorithm), ALGORITHMS),
            )
        if self.act_order and self.algorithm != "gptq":
            raise ConfigError("act order belongs to gptq", code="calibration", found=self.algorithm)

    def describe(self) -> str:
        order = ", in act order" if self.act_order else ""
        tokens = sum(map(len, self.windows))
        return f"{self.algorithm}{order}, on {counted(tokens, 'token')} of {self.source or 'text'}"


@dataclass(frozen=True)
class MadeLayer:
    """A quantised layer.

    error: relative distance of the weight to what it was (its input scales folded in).
    unreached: whether no input was recorded, so that the weight was rounded by itself.
    """

    layer: SourceLayer
    weight: CanonicalWeight
    error: float
    unreached: bool = False


class CalibratedModel:
    """The quantisation of a model, one step after the other, as a calibration text runs through it.

    scale_dtype: the dtype in which scales of weights must be exact; None: that in which they are made.
    """

    def __init__(self, prepared: Prepared, calibration: Calibration, scale_dtype: torch.dtype | None) -> None:
        self.calibration, self.scale_dtype = calibration, scale_dtype
        self.floats = FloatModel(prepared, calibration.windows)

    @torch.no_grad()
    def make(self, step: Step) -> tuple[list[MadeLayer], dict[str, Tensor]]:
        """Quantise a step's layers and run it.  Returns them, and the copied tensors that scales were folded into."""
        layers = {layer.name: layer for layer in step.layers}
        read = {layer.name: layer.read() for layer in step.layers}
        changed: dict[str, Tensor] = {}
        with self.floats.materialised(step, read) as running:
            if self.calibration.algorithm == "awq":
                changed = fold_input_scales(running, layers, self.scale_dtype)
            made = list(self._quantise(running, layers, read))
            self.floats.hidden = running.run()
        return made, changed

    def _quantise(
        self, step: FloatStep, layers: Mapping[str, SourceLayer], read: Mapping[str, CanonicalWeight]
    ) -> Iterator[MadeLayer]:
        for module_name, names in step.in_order(layers):
            inputs: Mapping[str, Tensor | None] = {}
            if any(layers[name].target is not None for name in names):
                inputs = step.inputs_by_layer(module_name, names)
            for name in names:
                yield self._quantised(layers[name], step.weights.get(name), inputs.get(name), read[name])

    def _quantised(
        self, layer: SourceLayer, floats: Tensor | None, inputs: Tensor | None, stored: CanonicalWeight
    ) -> MadeLayer:
        """Quantise one layer, and put the decoded new weight in the place of `floats`."""
        if layer.target is None:
            return MadeLayer(layer, stored, 0.0)
        if floats is None:  # a tied head: nothing runs behind it
            floats = layer.decode(stored)
        before = floats.clone()
        if inputs is None:
            if needs_inputs(layer.target):
                raise ConfigError(
                    "the method needs inputs for its activation scales, and no calibration input reached the layer",
                    code="calibration-values",
                    tensor=layer.name,
                    fix="Give it activations=token.",
                )
            weight = encode(layer.target, before, layer.shape, self.scale_dtype)
        else:
            weight = self._round(layer, before, inputs)
        floats.copy_(weight.dequantize(torch.float32))
        return MadeLayer(layer, weight, relative_error(floats, before), unreached=inputs is None)

    def _round(self, layer: SourceLayer, weight: Tensor, inputs: Tensor) -> CanonicalWeight:
        """Round a weight [O, I] by what it makes of its inputs [*, I].  ConfigError if these are not finite."""
        assert layer.target is not None
        if not bool(torch.isfinite(inputs).all()):
            raise ConfigError(
                "calibration inputs of this layer are not finite numbers",
                code="calibration-values",
                tensor=layer.name,
                fix="Check the model on this text: `pymllm verify MODEL --text FILE`.",
            )
        gptq = self.calibration.algorithm == "gptq"
        statistics = InputStatistics(weight.shape[1], gram=gptq and layer.planned_integers() is not None)
        statistics.add(inputs)
        made = quantize_calibrated(
            layer.target,
            weight,
            layer.shape,
            statistics,
            algorithm="gptq" if gptq else "clip",
            act_order=self.calibration.act_order,
            scale_dtype=self.scale_dtype or torch.float16,
            inputs=inputs,
        )
        return fitted(made, weight, self.scale_dtype)
