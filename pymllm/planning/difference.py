"""The difference between a saved plan and a new one: `pymllm plan MODEL --diff OLD.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError
from pymllm.planning.plan import SCHEMA_VERSION, Plan

COMPARED = ("kind", "method", "method_detail", "source_method", "kernel", "shape", "shape_local", "bytes")
SETTINGS = ("model", "model_type", "device", "dtype", "compute")


@dataclass(frozen=True)
class ChangedLayer:
    """A layer that both plans have.  before, after: what differs of `COMPARED`."""

    prefix: str
    before: dict[str, Any]
    after: dict[str, Any]


@dataclass(frozen=True)
class PlanDifference:
    """The difference from an older plan to a newer one.

    settings, totals: [before, after] of what differs.  changed: layers that both have.
    added, removed: names of layers that only the newer, or the older, one has.
    """

    settings: dict[str, list[Any]]
    totals: dict[str, list[int]]
    changed: list[ChangedLayer]
    added: list[str]
    removed: list[str]

    @property
    def empty(self) -> bool:
        return not (self.settings or self.totals or self.changed or self.added or self.removed)

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def groups(self) -> list[tuple[ChangedLayer, list[str], int, int]]:
        """Group the layers whose method and kernel change alike: (the first, all names, bytes before, bytes after)."""
        grouped: dict[str, list[ChangedLayer]] = {}
        for layer in self.changed:
            same = [
                {k: v for k, v in side.items() if k not in ("bytes", "shape_local")}
                for side in (layer.before, layer.after)
            ]
            grouped.setdefault(repr(same), []).append(layer)
        return [
            (
                group[0],
                [layer.prefix for layer in group],
                sum(layer.before.get("bytes", 0) for layer in group),
                sum(layer.after.get("bytes", 0) for layer in group),
            )
            for group in grouped.values()
        ]


def read_plan(file: Path) -> dict[str, Any]:
    """Read a plan as `pymllm plan --json` has saved it.  ConfigError for anything else."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the saved plan cannot be read: {error}", code="plan-file", file=str(file)
        ) from None
    version = saved.get("schema_version") if isinstance(saved, dict) else None
    layers = saved.get("layers") if isinstance(saved, dict) else None
    if version != SCHEMA_VERSION or not isinstance(layers, list) or not all(_is_layer(x) for x in layers):
        raise ConfigError(
            "the file holds no plan that a new one can be compared with",
            code="plan-file",
            file=str(file),
            expected=f"the output of `pymllm plan --json`, schema_version {SCHEMA_VERSION}",
            found=f"schema_version {version!r}",
        )
    return saved


def _is_layer(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("prefix"), str)


def compare_plans(before: Mapping[str, Any], after: Plan) -> PlanDifference:
    """Find what differs from an older plan to a newer one.  before: of `read_plan`, or another plan's `to_dict`."""
    new = after.to_dict()
    old_layers = {layer["prefix"]: layer for layer in before["layers"]}
    new_layers = {layer["prefix"]: layer for layer in new["layers"]}
    changed = []
    for prefix, layer in new_layers.items():
        old = old_layers.get(prefix)
        differing = [key for key in COMPARED if old is not None and old.get(key) != layer[key]]
        if old is not None and differing:
            keys = list(dict.fromkeys(["method_detail", "kernel", "bytes", *differing]))
            changed.append(
                ChangedLayer(prefix, {key: old.get(key) for key in keys}, {key: layer[key] for key in keys})
            )
    totals = before.get("totals") or {}
    return PlanDifference(
        {key: [before.get(key), new[key]] for key in SETTINGS if before.get(key) != new[key]},
        {
            key: [totals.get(key, 0), value]
            for key, value in new["totals"].items()
            if totals.get(key) != value
        },
        changed,
        [prefix for prefix in new_layers if prefix not in old_layers],
        [prefix for prefix in old_layers if prefix not in new_layers],
    )
