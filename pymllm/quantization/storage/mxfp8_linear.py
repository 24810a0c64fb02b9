"""MXFP8 linear weights under all names: e4m3 codes, and a power of two for every 32 inputs.

    weight        float8_e4m3fn [O, I]
    weight_scale  uint8 [O, I/32]      E8M0: 2^(byte - 127); some files declare it float8_e8m0fnu

w = weight * scale. The page with the layout: quantization/mxfp8/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.canonical import E4M3_MAX, Activations, CanonicalWeight, Fp8Weight, to_e4m3
from pymllm.quantization.method import StoredTensor
from pymllm.quantization.storage.fields import unsupported
from pymllm.quantization.storage.fp8_linear import E4M3LinearMethod
from pymllm.weights.spec import LinearShape

GROUP = 32
BLOCK = (1, GROUP)
BIAS = 127  # the exponent bias of E8M0
E8M0 = torch.float8_e8m0fnu
SCALES = ("weight_scale", "weight_scale_inv")  # both names multiply


@dataclass(frozen=True)
class MXFP8LinearMethod(E4M3LinearMethod):
    """MXFP8 weights.  The fields are `E4M3LinearMethod`'s; without exponent_bytes, the file declares E8M0."""

    block: tuple[int, int] = BLOCK
    activations: Activations = "float"
    exponent_bytes: bool = True
    name: ClassVar[str] = "mxfp8"
    scale_dtypes: ClassVar[tuple[torch.dtype, ...]] = (E8M0,)

    @property
    def scale_names(self) -> tuple[str, ...]:
        return SCALES

    def quantize(self, weight: Tensor, shape: LinearShape) -> CanonicalWeight:
        """Round a float weight [O, I] with the least power of two that brings each block's peak to 448 or less."""
        inputs = weight.shape[1]
        blocks = F.pad(weight.float(), (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))  # [O, ceil(I/32), 32]
        mantissas, exponents = torch.frexp(blocks.abs().amax(-1) / E4M3_MAX)
        exponents = (exponents - (mantissas == 0.5).int()).clamp(1 - BIAS, BIAS)
        scales = (exponents + BIAS).to(torch.uint8).view(E8M0).float()
        codes = to_e4m3(blocks / scales[..., None]).flatten(1)[:, :inputs].contiguous()
        return Fp8Weight(codes, scales, (1, GROUP if inputs > GROUP else 0), self.activations)

    def describe(self) -> str:
        return f"mxfp8, activations {self.activations}"


def stored_mxfp8(
    stored: Mapping[str, StoredTensor], prefix: str, what: str, activations: Activations
) -> MXFP8LinearMethod:
    """Make the method that reads the layer `prefix`, by how the file declares its scales.

    stored: the checkpoint's headers.  what: the format's name, for the ConfigError where the scales are no exponents.
    """
    scale = next((stored[name] for name in (f"{prefix}.{s}" for s in SCALES) if name in stored), None)
    if scale is not None and scale.dtype not in (torch.uint8, E8M0):
        expected = "uint8 or float8_e8m0fnu, the exponents of powers of two"
        raise unsupported(what, "weight_scale", str(scale.dtype), expected, within=f"{prefix}.")
    return MXFP8LinearMethod(BLOCK, activations, scale is None or scale.dtype is torch.uint8)
