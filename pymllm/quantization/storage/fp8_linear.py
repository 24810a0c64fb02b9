"""FP8 e4m3 linear weights: what the formats share, which differ in the names of tensors and in the shapes of scales.

    weight       float8_e4m3fn [O, I]
    scale        float [1] (per tensor), [O, 1] (per channel) or [ceil(O/b0), ceil(I/b1)] (blocks of b0 x b1)
    input_scale  float [1]     with static activations

w = weight * scale. The page with the layouts: quantization/fp8/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymllm.kernels.canonical import CHANNEL, TENSOR, Activations, CanonicalWeight, Fp8Type, Fp8Weight
from pymllm.quantization.method import LinearMethodBase
from pymllm.quantization.storage.packing import refuse_nan_codes, refuse_nan_scales
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec, whole


@dataclass(frozen=True)
class E4M3LinearMethod(LinearMethodBase):
    """e4m3 weights: codes, and a scale to multiply them with.  Subclasses say what their format calls the tensors.

    block: the (outputs, inputs) that share a scale; a side of 0 is the whole axis: TENSOR, CHANNEL, or a block.
    activations: "static" has an `input_scale` for each tensor.
    exponent_bytes: scales are stored as the exponents of powers of two, in plain bytes.
    """

    block: tuple[int, int]
    activations: Activations
    exponent_bytes: bool = False
    weight_name: ClassVar[str] = "weight"
    input_scale_names: ClassVar[tuple[str, ...]] = ("input_scale",)
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    one_value: ClassVar[tuple[int, ...]] = (1,)  # the shape of a single scale as it is written

    @property
    def scale_names(self) -> tuple[str, ...]:
        """The names of the scale, the usual one first."""
        return ("weight_scale",)

    @property
    def scale_dims(self) -> tuple[Dim, ...]:
        """The dimensions of the stored scale."""
        return (PART,) if self.block == TENSOR else (OUT.every(self.block[0]), IN.every(self.block[1]))

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        weight = WeightSpec(self.weight_name, torch.float8_e4m3fn, (OUT, IN), refuse=refuse_nan_codes)
        if self.exponent_bytes:
            scale = _spec(self.scale_names, torch.uint8, self.scale_dims, refuse=refuse_nan_scales)
        else:
            accepts = self.scale_dtypes
            scale = _spec(self.scale_names, torch.float32, self.scale_dims, accepts=accepts, scale=True)
        if self.activations != "static":
            return weight, scale
        inputs = _spec(self.input_scale_names, torch.float32, (PART,), accepts=FLOATS, scale=True)
        return weight, scale, inputs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        scales = tensors[self.scale_names[0]]
        if scales.ndim == 4:  # [O/b0, 1, I/b1, 1]
            scales = scales.flatten(2).flatten(0, 1)
        return Fp8Weight.from_parts(
            tensors[self.weight_name],
            scales.view(torch.float8_e8m0fnu).float() if self.exponent_bytes else scales,
            self.block,
            [span.size for span in shape.outputs],
            self.activations,
            tensors.get(self.input_scale_names[0]),
        )

    def to_stored(self, weight: CanonicalWeight, shape: LinearShape) -> dict[str, Tensor]:
        assert isinstance(weight, Fp8Weight)
        scales = weight.scales.float().contiguous()
        if self.exponent_bytes:
            scales = scales.to(torch.float8_e8m0fnu).view(torch.uint8)
        tensors = {
            self.weight_name: weight.weight.contiguous(),
            self.scale_names[0]: self._stored_scales(scales),
        }
        if self.activations == "static":
            assert weight.input_scales is not None
            tensors[self.input_scale_names[0]] = weight.input_scales.float().reshape(self.one_value)
        return tensors

    def _stored_scales(self, scales: Tensor) -> Tensor:
        """Give canonical scales [⌈O/b0⌉, ⌈I/b1⌉] the stored shape."""
        return scales.reshape(self.one_value) if self.block == TENSOR else scales

    def describe(self) -> str:
        return f"{self.name} {Fp8Type(self.block, self.activations)}"


def _spec(names: tuple[str, ...], dtype: torch.dtype, dims: tuple[Dim, ...], **more: Any) -> WeightSpec:
    return WeightSpec(names[0], dtype, dims, aliases=names[1:], **more)


@dataclass(frozen=True)
class NamedFp8LinearMethod(E4M3LinearMethod):
    """The e4m3 weights of a format whose tensors have the usual names.

    format: its name.  flat_scale: a scale for each channel is stored as [O] instead of [O, 1].
    spaced_scale: scales of blocks are stored as [O/b0, 1, I/b1, 1].
    """

    _: KW_ONLY
    format: str
    flat_scale: bool = False
    spaced_scale: bool = False
    one_value: ClassVar[tuple[int, ...]] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.format

    @property
    def scale_dims(self) -> tuple[Dim, ...]:
        dims = super().scale_dims
        if self.flat_scale and self.block == CHANNEL:
            return (OUT,)
        return (dims[0], whole(1), dims[1], whole(1)) if self.spaced_scale else dims

    def _stored_scales(self, scales: Tensor) -> Tensor:
        if self.flat_scale and self.block == CHANNEL:
            return scales.flatten()
        return scales[:, None, :, None] if self.spaced_scale else super()._stored_scales(scales)
