"""The MLX spelling: what mlx-lm loads, affine integers and 4-bit and 8-bit floats, each layer in a setting of its own.

The most frequent setting stands for all, and others under the layer's name. Floats have no scales, which says it. The
experts of a layer are stacked, as mlx-lm has them. The layout: quantization/mlx/README.md.
"""

# E experts, O out_features, I in_features

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import CanonicalWeight, CodebookWeight, DenseWeight, Fp8Weight, IntWeight
from pymllm.quantization.formats.mlx import AFFINE_BITS, E4M3, E8M0, MLXLinearMethod, offsets_of
from pymllm.quantization.formats.none import UnquantizedLinearMethod
from pymllm.quantization.method import LinearMethodBase
from pymllm.weights.spec import LinearShape
from pymllm.writing.checkpoint_writer import CheckpointWriter
from pymllm.writing.layers import Step
from pymllm.writing.spelling import SpelledLayer, cannot_express

SIZES = (32, 64, 128)  # of affine groups, which MLX has kernels for
# model.layers.0.mlp.experts.3.up_proj is number 3 of model.layers.0.mlp.switch_mlp.up_proj.
EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<name>\w+)(?P<suffix>\.\w+)?")
NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class MLXSpelling:
    """The spelling that `mlx_lm.convert` writes."""

    name = "mlx"

    def store(self, weight: CanonicalWeight, shape: LinearShape, kind: str) -> LinearMethodBase:
        """Choose the mode that holds exactly this weight.  ConfigError if there is none."""
        if isinstance(weight, DenseWeight):
            return UnquantizedLinearMethod()
        method = _method(weight)
        if isinstance(method, str):
            raise cannot_express(
                self.name,
                shape,
                method,
                expected="integers in groups of 32, 64 or 128, MXFP4, MXFP8 or NVFP4",
                fix=f"Give the layer a rule that quantises it anew: {shape.name}=mlx:bits=4,group_size=64.",
            )
        method.check(shape)
        return method

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype | None:
        """Return None: weights are stored as they are made, and MLX's own have scales in the model's dtype."""
        return None

    def config(self, layers: Mapping[str, SpelledLayer]) -> dict[str, Any]:
        """Make `quantization`.  ConfigError where the experts of a layer, which are one tensor, differ."""
        settings: dict[str, dict[str, Any] | None] = {}
        for name, layer in layers.items():
            method, at = layer.method, stacked_name(name)
            setting = None
            if isinstance(method, MLXLinearMethod):
                setting = {"group_size": method.group_size, "bits": method.bits, "mode": method.mode}
            if settings.setdefault(at, setting) != setting:
                raise ConfigError(
                    "the mlx spelling has all experts of a layer in one tensor, and these differ",
                    code="spelling",
                    tensor=at,
                    expected=f"one method for all, as of {at}: {settings[at] or 'floats'}",
                    found=f"{name}: {setting or 'floats'}",
                    fix="Give all experts of the layer the same rule.",
                )
        quantised = {name: setting for name, setting in settings.items() if setting is not None}
        counts = Counter(tuple(setting.items()) for setting in quantised.values())
        usual = dict(counts.most_common(1)[0][0]) if counts else {}
        return usual | {name: setting for name, setting in quantised.items() if setting != usual}


class MLXWriter(CheckpointWriter):
    """The writer of a folder that mlx-lm loads: experts are stacked."""

    def final(self, step: Step, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stack the experts' tensors [O, I] to [E, O, I], in the order of their numbers."""
        written: dict[str, Tensor] = {}
        experts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            found = EXPERT.fullmatch(name)
            if found is None:
                written[name] = tensor
            else:
                experts.setdefault(stacked_name(name), {})[int(found["index"])] = tensor
        for name, members in experts.items():
            written[name] = torch.stack([members[index] for index in sorted(members)])
        return super().final(step, written)


def stacked_name(name: str) -> str:
    """Return the name of the tensor, or the layer, that holds all experts; of no expert's, the name itself."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return name
    return f"{found['block']}.switch_mlp.{NAMES.get(found['name'], found['name'])}{found['suffix'] or ''}"


def _method(weight: CanonicalWeight) -> MLXLinearMethod | str:
    """Choose the method for a quantised weight, or return what of the weight it cannot hold."""
    if isinstance(weight, IntWeight):
        return _affine(weight)
    if isinstance(weight, Fp8Weight):
        powers = weight.scales.is_meta or torch.equal(weight.scales.to(E8M0).float(), weight.scales)
        if weight.block == (1, 32) and weight.activations == "float" and powers:
            return MLXLinearMethod(8, 32, "mxfp8")
    if isinstance(weight, CodebookWeight) and weight.codebook == "e2m1":
        plain = weight.row_scales is None and weight.activations == "float"
        for mode, dtype, size in (("mxfp4", E8M0, 32), ("nvfp4", E4M3, 16)):
            if plain and weight.scales.dtype is dtype and weight.group_size == size:
                return MLXLinearMethod(4, size, mode)
        if weight.row_scales is not None:
            return f"{weight.type} with a second scale"
    return f"{weight.type}"


def _affine(weight: IntWeight) -> MLXLinearMethod | str:
    if weight.group_index is not None or weight.input_order is not None:
        return "groups in act order"
    if weight.activations != "float" or weight.bits not in AFFINE_BITS:
        return f"{weight.type}"
    if weight.group_size not in SIZES:
        return f"groups of {weight.group_size}"
    dtype = weight.scales.dtype
    if weight.offsets is not None:
        dtype = torch.promote_types(dtype, weight.offsets.dtype)
    elif weight.zeros is not None:
        dtype = torch.float32  # a zero point times a scale of 16 bits has up to 19
    offsets = offsets_of(weight)
    if not offsets.is_meta and not torch.equal(offsets.to(dtype).float(), offsets.float()):
        dtype = torch.float32  # too large for float16
    return MLXLinearMethod(weight.bits, weight.group_size, "affine", dtype)
