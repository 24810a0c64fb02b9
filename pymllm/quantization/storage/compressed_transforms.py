"""`transform_config` of compressed-tensors: rotations of weights (SpinQuant, QuIP), where they are applied already.

A transform has a location. `weight_input` and `weight_output` are folded into the stored weights by the writer, and
nothing is left to do. All others (input, output, q_attn, k_cache) rotate activations as the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pymllm.errors import ConfigError
from pymllm.quantization.storage.fields import unsupported

FOLDED = ("weight_input", "weight_output")


def refuse_online_transforms(settings: Any) -> tuple[str, ...]:
    """Check that every transform is folded into the weights, and return what a plan says of them.

    settings: `transform_config`, or None.  ConfigError for a location where activations are rotated.
    """
    if not settings:
        return ()
    groups = settings.get("config_groups") if isinstance(settings, Mapping) else None
    if not isinstance(groups, Mapping):
        raise unsupported("compressed-tensors", "transform_config", settings, "an object with config_groups")
    for name, group in groups.items():
        applied = group.get("apply") if isinstance(group, Mapping) else None
        if not isinstance(applied, list):
            raise unsupported("compressed-tensors", f"transform_config.config_groups.{name}", group, "apply")
        for index, entry in enumerate(applied):
            location = entry.get("location") if isinstance(entry, Mapping) else None
            if location not in FOLDED:
                raise ConfigError(
                    f"the transform {name} rotates activations at {location!r} as the model runs, which is not "
                    "implemented: without it every answer would be wrong",
                    code="quantization-config",
                    file="config.json",
                    tensor=f"quantization_config.transform_config.config_groups.{name}.apply[{index}].location",
                    expected=f"{' or '.join(FOLDED)}, which are folded into the stored weights",
                    found=repr(location),
                    fix="Export the model without its online rotations (SpinQuant's R3 and R4, QuIP's inputs).",
                )
    names = ", ".join(map(str, groups))
    return (
        f"the checkpoint's transforms ({names}) are folded into its weights: nothing is left to apply",
    ) * bool(names)
