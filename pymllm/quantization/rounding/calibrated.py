"""Calibration, whatever the format: statistics of a layer's inputs, and weights that are rounded by them."""

# N rows of inputs, I in_features, O out_features, G group_size

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import E4M3_MAX, CanonicalWeight, Fp8Weight, IntWeight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.rounding.awq import grams_of, round_with_clipping
from pymllm.quantization.rounding.gptq import round_with_hessian
from pymllm.weights.spec import LinearShape

INT8_MAX = 127.5  # halfway between the magnitudes of the largest and the smallest code


class InputStatistics:
    """Statistics of the inputs that one layer saw.

    gram: [I, I] float32, the inputs' products with one another, summed over rows; None where nothing asks for it.
    peak: the largest magnitude.  rows: how many rows there were.
    """

    def __init__(self, in_features: int, *, gram: bool) -> None:
        self.gram = torch.zeros((in_features, in_features)) if gram else None
        self.peak, self.rows = 0.0, 0

    def add(self, inputs: Tensor) -> None:
        """Count these inputs in.  inputs: [*, I]."""
        rows = inputs.detach().to("cpu", torch.float32).flatten(0, -2)
        if not rows.numel():
            return
        if self.gram is not None:
            self.gram += rows.t() @ rows
        self.peak = max(self.peak, float(rows.abs().max()))
        self.rows += rows.shape[0]

    def grams(self, group_size: int) -> Tensor:
        """Cut each group's own products out of `gram`.  Returns [I/G, G, G]."""
        assert self.gram is not None
        groups = self.gram.shape[0] // group_size
        blocks = self.gram.view(groups, group_size, groups, group_size)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def needs_inputs(target: LinearMethodBase) -> bool:
    """Tell whether a method has activation scales that can only be found from inputs."""
    return getattr(target, "activations", "float") == "static"


def without_static(target: LinearMethodBase) -> LinearMethodBase:
    """Return the same method with a scale for each token in place of static activation scales."""
    changed: Any = target
    return replace(changed, activations="token") if needs_inputs(target) else target


def with_input_scale(weight: CanonicalWeight, peak: float, name: str) -> CanonicalWeight:
    """Give `weight` a static activation scale that takes `peak` to the largest code.

    name: the layer's, for messages.  ConfigError for a peak that is zero or not finite.
    """
    assert isinstance(weight, (IntWeight, Fp8Weight))
    scale = torch.tensor([peak / (INT8_MAX if isinstance(weight, IntWeight) else E4M3_MAX)])
    if not bool(torch.isfinite(scale).all()) or not float(scale):
        raise ConfigError(
            "the calibration inputs of this layer are all zero, or some are not finite",
            code="calibration-values",
            tensor=name,
            expected="finite inputs, some other than zero",
            found=f"a largest magnitude of {peak}",
        )
    return replace(weight, activations="static", input_scales=scale)


def quantize_calibrated(
    target: LinearMethodBase,
    weight: Tensor,
    shape: LinearShape,
    statistics: InputStatistics,
    *,
    algorithm: str,
    act_order: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    inputs: Tensor | None = None,
) -> CanonicalWeight:
    """Quantise a weight [O, I] float32 to the format of `target`, rounded for the least error on the inputs.

    algorithm: "gptq" (needs statistics.gram), or "clip", AWQ's search of ranges (needs that, or `inputs` [N, I]).
    Both are for integer codes with integer zero points; the weights of other formats are rounded without the inputs.
    """
    made = without_static(target).quantize(weight, shape)
    if isinstance(made, IntWeight) and made.offsets is None and target.free_scales and statistics.rows:
        symmetric = made.zeros is None
        if algorithm == "gptq":
            assert statistics.gram is not None
            rounded = round_with_hessian(
                weight,
                statistics.gram,
                bits=made.bits,
                group_size=made.group_size,
                symmetric=symmetric,
                act_order=act_order,
                scale_dtype=scale_dtype,
                name=shape.name,
            )
        else:
            grams = statistics.grams(made.group_size) if inputs is None else grams_of(inputs, made.group_size)
            rounded = round_with_clipping(
                weight, grams, bits=made.bits, group_size=made.group_size, symmetric=symmetric
            )
        made = replace(rounded, activations=made.activations)
    return with_input_scale(made, statistics.peak, shape.name) if needs_inputs(target) else made
