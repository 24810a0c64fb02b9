"""What shares a scale: groups of inputs, which must divide a layer and a rank's share of it; parts, which have rows."""

# O out_features, P parts of a fused layer

from __future__ import annotations

import torch
from torch import Tensor

from pymllm.errors import ConfigError, ShardingError, counted
from pymllm.weights.spec import LinearShape

OTHER_SIZE = "Use a group size that divides every layer's inputs, or -1 for whole rows."


def group_within(size: int, inputs: int) -> int:
    """Return how many of `inputs` inputs share a scale where `size` should: all of them for a size of 0 or less."""
    return min(size, inputs) if size > 0 else inputs


def check_groups(size: int, shape: LinearShape, *, what: str = "groups", fix: str | None = None) -> None:
    """Raise ConfigError if groups of `size` do not divide the layer's inputs.  A size of 0 or less divides any.

    what: how the message calls the groups.  fix: what the user should do.
    """
    if size > 0 and shape.in_features % size:
        raise ConfigError(
            f"{what} of {size} do not divide the {shape.in_features} inputs",
            code="group-size",
            tensor=shape.name,
            expected=f"a multiple of {counted(size, 'input')}",
            found=f"a weight of {shape.out_features} outputs x {shape.in_features} inputs",
            fix=fix,
        )


def check_share(size: int, shape: LinearShape, *, what: str = "groups") -> None:
    """Raise ShardingError unless this rank's inputs are whole groups, or lie within one."""
    local = shape.in_features_local
    if size > 0 and local > size and local % size:
        raise ShardingError(
            f"{shape.name}: this rank has {local} inputs, which {what} of {size} do not divide",
            code="tp-granule",
            expected=f"a multiple of {size}",
            found=str(local),
        )


def rows_of_parts(values: Tensor, shape: LinearShape) -> Tensor:
    """Give each part's value to all of its rows: [P] -> [O]."""
    rows = [value.expand(span.size) for value, span in zip(values.unbind(), shape.outputs, strict=True)]
    return torch.cat(rows)
