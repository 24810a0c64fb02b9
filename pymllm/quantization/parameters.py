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
    """Return the layer's own shape.  A module that has none gets one made of these sizes.

    The shape that is made is of an unsharded layer or, where local and full sizes differ, of the first rank's share.
    """
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
    """Register the parameter for `spec` on `layer`, ready for `weight_loader`.

    It holds zeros where this rank's share is padded, as nothing is loaded there.  attrs: more attributes for it.
    """
    local, slots = place(spec, shape)
    padded = sum(slot.elements for slot in slots) != math.prod(local)
    param = nn.Parameter(
        (torch.zeros if padded else torch.empty)(local, dtype=spec.dtype), requires_grad=False
    )
    layer.register_parameter(spec.name, param)
    loader = {"weight_loader": layer.weight_loader} if hasattr(layer, "weight_loader") else {}
    set_weight_attrs(param, {"slots": slots, "written": Written(), **loader, **attrs})


def set_weight_attrs(param: Tensor, attrs: Mapping[str, Any] | None) -> None:
    """Attach loader metadata to a parameter.  ConfigError for a name that the parameter already has."""
    for key, value in (attrs or {}).items():
        if hasattr(param, key):
            raise ConfigError(
                f"the parameter already has the attribute {key!r}",
                code="attribute-overwritten",
                fix="Give loader metadata names that torch.Tensor does not use, each once.",
            )
        setattr(param, key, value)


def load_into(param: Tensor, loaded: Tensor, part: int | None, layer: str) -> None:
    """Cut `loaded`, a full checkpoint tensor, for this rank and write it once: the `weight_loader` of every layer.

    part: the part of a fused layer that `loaded` is; None: the only one, or all parts side by side along their outputs.
    layer: its name, for messages.
    """
    copy_full_tensor(param.data, param.slots, loaded, param.written, part, layer)  # type: ignore[attr-defined]
