"""Groups and blocks of inputs: which layers, and which ranks' shares of them, they divide."""

from __future__ import annotations

from pymllm.errors import ConfigError, ShardingError
from pymllm.weights.spec import LinearShape

OTHER_SIZE = "Use a group size that divides every layer's inputs, or -1 for whole rows."


def check_groups(size: int, shape: LinearShape, *, what: str = "groups", fix: str | None = None) -> None:
    """ConfigError unless groups of `size` divide the layer's inputs; any layer is well where size is not above 0."""
    if size > 0 and shape.in_features % size:
        raise ConfigError(
            f"{what} of {size} do not divide the {shape.in_features} inputs",
            code="group-size",
            tensor=shape.name,
            expected=f"a multiple of {size} inputs",
            found=f"a weight of {shape.out_features} outputs x {shape.in_features} inputs",
            fix=fix,
        )


def check_share(size: int, shape: LinearShape, *, what: str = "groups") -> None:
    """ShardingError unless this rank has whole groups, or lies within one."""
    local = shape.in_features_local
    if size > 0 and local > size and local % size:
        raise ShardingError(
            f"{shape.name}: this rank has {local} inputs, which {what} of {size} do not divide",
            code="tp-granule",
            expected=f"a multiple of {size}",
            found=str(local),
        )
