"""compressed-tensors, float-quantized: FP8 e4m3 as llm-compressor writes it.

    weight        float8_e4m3fn [O, I]
    weight_scale  float [1] (tensor), [O, 1] (channel) or [ceil(O/b0), ceil(I/b1)] (block), in the model's dtype
    input_scale   float [1]   with static activations

w = weight * weight_scale. The page with the layouts: quantization/fp8/README.md.
"""

# I in_features, O out_features

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.kernels.canonical import Activations, CanonicalWeight, Fp8Weight
from pymllm.quantization.base import LinearMethodBase, QuantizationConfig, read_names, register_quantization
from pymllm.weights.spec import FLOATS, IN, OUT, PART, Dim, LinearShape, WeightSpec

FORMATS = ("float-quantized", "naive-quantized")
KV_CACHE_SCALES = re.compile(r"\.(k|v|q)_(scale|zero_point)$")


@dataclass(frozen=True)
class FloatQuantizedLinearMethod(LinearMethodBase):
    """block: the (outputs, inputs) that share a scale; (0, 0): the tensor, (1, 0): a channel."""

    block: tuple[int, int]
    activations: Activations
    name: ClassVar[str] = "compressed-tensors"

    def weight_specs(self, shape: LinearShape) -> tuple[WeightSpec, ...]:
        per_tensor: tuple[Dim, ...] = (PART,)
        dims = per_tensor if self.block == (0, 0) else (OUT.every(self.block[0]), IN.every(self.block[1]))
        specs = (
            WeightSpec("weight", torch.float8_e4m3fn, (OUT, IN)),
            WeightSpec("weight_scale", torch.float32, dims, accepts=FLOATS, scale=True),
        )
        if self.activations == "static":
            specs += (WeightSpec("input_scale", torch.float32, per_tensor, accepts=FLOATS, scale=True),)
        return specs

    def to_canonical(self, tensors: Mapping[str, Tensor], shape: LinearShape) -> CanonicalWeight:
        return Fp8Weight.from_parts(
            tensors["weight"],
            tensors["weight_scale"],
            self.block,
            [span.size for span in shape.outputs],
            self.activations,
            tensors.get("input_scale"),
        )

    def describe(self) -> str:
        granularity = {(0, 0): "tensor", (1, 0): "channel"}.get(self.block, f"block {self.block[0]}x{self.block[1]}")
        return f"compressed-tensors fp8 e4m3 per {granularity}, activations {self.activations}"


@dataclass(frozen=True)
class Group:
    """One of `config_groups`: which layers, and their method."""

    name: str
    targets: tuple[str, ...]
    method: FloatQuantizedLinearMethod


@register_quantization("compressed-tensors")
class CompressedTensorsConfig(QuantizationConfig):
    """`quantization_config` of compressed-tensors: config_groups with targets, ignore, format."""

    def __init__(self, *, groups: Sequence[Group], ignore: Sequence[str] = ()) -> None:
        self.groups, self.ignore = tuple(groups), tuple(ignore)

    @classmethod
    def get_name(cls) -> str:
        return "compressed-tensors"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CompressedTensorsConfig:
        sparsity = config.get("sparsity_config") or {"format": "dense"}
        if not isinstance(sparsity, Mapping) or sparsity.get("format") != "dense":
            raise _unsupported("sparsity_config", sparsity, "none, or format dense")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise _unsupported("config_groups", groups, "an object of groups")
        return cls(
            groups=[_read_group(name, group, config.get("format")) for name, group in groups.items()],
            ignore=read_names(config, "ignore"),
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        kind = getattr(layer, "kind", "linear")
        if kind == "embedding" or any(_targets(pattern, prefix) for pattern in self.ignore):
            return None
        if self.stored_as_float(prefix):
            return None
        # A group that names the layer comes before one that names its class.
        for by_name in (True, False):
            for group in self.groups:
                for target in group.targets:
                    if _targets(target, prefix) if by_name else target == "Linear":
                        return group.method
        return None

    def skip_reason(self, tensor: str) -> str | None:
        return "a scale of the KV cache, which is kept in floats" if KV_CACHE_SCALES.search(tensor) else None


def _targets(pattern: str, prefix: str) -> bool:
    """Whether a target or ignore entry names this layer: exactly, or as `re:` from its start."""
    return bool(re.match(pattern[3:], prefix)) if pattern.startswith("re:") else pattern == prefix


def _read_group(name: str, group: Any, default_format: Any) -> Group:
    at = f"config_groups.{name}"
    if not isinstance(group, Mapping):
        raise _unsupported(at, group, "an object")
    file_format = group.get("format") or default_format
    if file_format not in FORMATS:
        raise _unsupported(f"{at}.format", file_format, " or ".join(FORMATS))
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        raise _unsupported(f"{at}.weights", weights, "type float with num_bits 8")
    if not weights.get("symmetric", True):
        raise _unsupported(f"{at}.weights.symmetric", False, "true")
    strategy = weights.get("strategy")
    if strategy == "block":
        structure = weights.get("block_structure")
        if not (isinstance(structure, list) and len(structure) == 2 and all(type(s) is int and s > 0 for s in structure)):
            raise _unsupported(f"{at}.weights.block_structure", structure, "two positive integers")
        block = (structure[0], structure[1])
    elif strategy in ("tensor", "channel"):
        block = (0, 0) if strategy == "tensor" else (1, 0)
    else:
        raise _unsupported(f"{at}.weights.strategy", strategy, "tensor, channel or block")
    method = FloatQuantizedLinearMethod(block, _read_activations(f"{at}.input_activations", group))
    return Group(name, read_names(group, "targets"), method)


def _read_activations(at: str, group: Mapping[str, Any]) -> Activations:
    settings = group.get("input_activations")
    if settings is None:
        return "float"
    if not isinstance(settings, Mapping) or (settings.get("type"), settings.get("num_bits")) != ("float", 8):
        raise _unsupported(at, settings, "null, or type float with num_bits 8")
    if not settings.get("dynamic"):
        return "static"
    strategy = settings.get("strategy")
    strategies: dict[Any, Activations] = {"token": "token", "tensor": "tensor", "group": "group"}
    if not isinstance(strategy, str) or strategy not in strategies:
        raise _unsupported(f"{at}.strategy", strategy, " or ".join(strategies))
    return strategies[strategy]


def _unsupported(field: str, value: Any, supported: str) -> ConfigError:
    return ConfigError(
        f"compressed-tensors with this {field.rpartition('.')[2]} cannot be read",
        code="quantization-config",
        file="config.json",
        tensor=f"quantization_config.{field}",
        expected=supported,
        found=repr(value),
    )
