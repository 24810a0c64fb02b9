"""The parameters of a layer, as the checkpoint stores its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymllm.errors import ConfigError
from pymllm.weights.loader import Written, copy_full_tensor, place
from pymllm.weights.spec import LinearShape, Span, WeightSpec


def layer_shape(
    layer: nn.Module,
    in_local: int,
    out_local: list[int],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> LinearShape:
    """The layer's own shape, or, for a bare module, one made of the sizes: unsharded, or the first rank's share."""
    if not hasattr(layer, "shape"):
        total = sum(out_local)
        outputs = tuple(
            Span(0, size, size * out_features // total if out_features % total == 0 else size)
            for size in out_local
        )
        layer.shape = LinearShape(  # type: ignore[assignment]
            Span(0, in_local, in_features), outputs, tuple("" for _ in out_local), dtype
        )
    return layer.shape  # type: ignore[return-value]


def add_weight(layer: nn.Module, spec: WeightSpec, shape: LinearShape, **attrs: Any) -> None:
    """Register the parameter for `spec` on `layer`, ready for `weight_loader`: zeros where the share is padded."""
    local, slots = place(spec, shape)
    padded = sum(slot.elements for slot in slots) != math.prod(local)
    param = nn.Parameter(
        (torch.zeros if padded else torch.empty)(local, dtype=spec.dtype), requires_grad=False
    )
    layer.register_parameter(spec.name, param)
    loader = {"weight_loader": layer.weight_loader} if hasattr(layer, "weight_loader") else {}
    set_weight_attrs(param, {"slots": slots, "written": Written(), **loader, **attrs})


def set_weight_attrs(param: Tensor, attrs: Mapping[str, Any] | None) -> None:
    """Attach loader metadata to a parameter.  Overwriting an attribute is an error."""
    for key, value in (attrs or {}).items():
        if hasattr(param, key):
            raise ConfigError(
                f"the parameter already has the attribute {key!r}",
                code="attribute-overwritten",
                fix="Give loader metadata names that torch.Tensor does not use, each once.",
            )
        setattr(param, key, value)


def load_into(param: Tensor, loaded: Tensor, part: int | None, layer: str) -> None:
    """`weight_loader` for every layer: cut `loaded` (a full checkpoint tensor) for this rank and write it once."""
    copy_full_tensor(param.data, param.slots, loaded, param.written, part, layer)  # type: ignore[attr-defined]
