"""What calibration inputs are good for, whatever the layer is in: their statistics, and weights rounded with them."""

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

INT8_MAX = 127.5  # halfway between the largest codes on either side


class InputStatistics:
    """Of the inputs that one layer saw.

    gram: [I, I] float32, the sum over rows of their products; None where nothing asks for it.
    peak: the largest magnitude.  rows: how many there were.
    """

    def __init__(self, in_features: int, *, gram: bool) -> None:
        self.gram = torch.zeros((in_features, in_features)) if gram else None
        self.peak, self.rows = 0.0, 0

    def add(self, inputs: Tensor) -> None:
        """inputs: [*, I]."""
        rows = inputs.detach().to("cpu", torch.float32).flatten(0, -2)
        if not rows.numel():
            return
        if self.gram is not None:
            self.gram += rows.t() @ rows
        self.peak = max(self.peak, float(rows.abs().max()))
        self.rows += rows.shape[0]

    def grams(self, group_size: int) -> Tensor:
        """[I/G, G, G]: what `gram` holds of each group."""
        assert self.gram is not None
        groups = self.gram.shape[0] // group_size
        blocks = self.gram.view(groups, group_size, groups, group_size)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def needs_inputs(target: LinearMethodBase) -> bool:
    """Whether a method has activation scales that only inputs can tell."""
    return getattr(target, "activations", "float") == "static"


def without_static(target: LinearMethodBase) -> LinearMethodBase:
    """The same weights; activations by a scale a token."""
    changed: Any = target
    return replace(changed, activations="token") if needs_inputs(target) else target


def with_input_scale(weight: CanonicalWeight, peak: float, name: str) -> CanonicalWeight:
    """`weight` with a static activation scale that takes `peak` to the largest code."""
    assert isinstance(weight, (IntWeight, Fp8Weight))
    scale = torch.tensor([peak / (INT8_MAX if isinstance(weight, IntWeight) else E4M3_MAX)])
    if not bool(torch.isfinite(scale).all()) or not float(scale):
        raise ConfigError(
            "calibration inputs of this layer are all zero, or not finite",
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
    """A weight [O, I] float32 in the format of `target`, rounded with regard to the inputs.

    algorithm: "gptq" (needs statistics.gram), or "clip", AWQ's search of ranges (needs that, or `inputs` [N, I]).
    Both are for integer codes with integer zero points; other formats are rounded by themselves.
    """
    made = without_static(target).quantize(weight, shape)
    if isinstance(made, IntWeight) and made.offsets is None and statistics.rows:
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
