"""The difference between a saved plan and a new one: `pymllm plan MODEL --diff OLD.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pymllm.errors import ConfigError
from pymllm.planning.plan import SCHEMA_VERSION, Plan

COMPARED = (
    *("kind", "rule", "source", "method", "method_detail", "source_method", "kernel", "numerics"),
    *("rounds_activations", "shape", "shape_local", "bytes", "fused_with", "tied_to"),
    *("kv_bytes_per_token", "state_bytes"),
)
SIZES = ("bytes", "kv_bytes_per_token", "state_bytes")
SETTINGS = ("model", "model_type", "device", "dtype", "compute")
# Of the plan's objects, the settings that are compared, as "tensor_parallel.size".
OBJECTS = {
    "tensor_parallel": ("rank", "size", "expert_parallel", "legal_sizes"),
    "elementwise": ("kernel",),
    "sampling": ("kernel",),
    "decoding_graph": ("captured", "why_not"),
    "strategy": ("name", "settings", "draft"),
    "kv_cache": (
        "tokens",
        "bytes",
        "max_model_len",
        "decided_by",
        "requests",
        "remembered_states",
        "state_bytes",
    ),
}


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
    further: [before, after] of what differs in the plan's objects, as "kv_cache.tokens".
    notes: those of the older plan alone, and those of the newer one alone.
    """

    settings: dict[str, list[Any]]
    totals: dict[str, list[int]]
    changed: list[ChangedLayer]
    added: list[str]
    removed: list[str]
    further: dict[str, list[Any]] = field(default_factory=dict)
    notes: list[list[str]] = field(default_factory=lambda: [[], []])

    @property
    def empty(self) -> bool:
        layers = self.changed or self.added or self.removed
        return not (self.settings or self.totals or layers or self.further or any(self.notes))

    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def groups(self) -> list[tuple[ChangedLayer, list[str], dict[str, int], dict[str, int]]]:
        """Group the layers that change alike: (the first, all names, the sums of `SIZES` before, and after)."""
        grouped: dict[str, list[ChangedLayer]] = {}
        for layer in self.changed:
            same = [
                {k: v for k, v in side.items() if k not in (*SIZES, "shape_local", "fused_with")}
                for side in (layer.before, layer.after)
            ]
            grouped.setdefault(repr(same), []).append(layer)
        return [
            (
                group[0],
                [layer.prefix for layer in group],
                _sums(layer.before for layer in group),
                _sums(layer.after for layer in group),
            )
            for group in grouped.values()
        ]


def _sums(layers: Iterable[dict[str, Any]]) -> dict[str, int]:
    listed = list(layers)
    return {key: sum(layer.get(key) or 0 for layer in listed) for key in SIZES}


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
        differing = [key for key in COMPARED if old is not None and key in old and old[key] != layer[key]]
        if old is not None and differing:
            sizes = [key for key in SIZES if key == "bytes" or old.get(key) or layer[key]]
            keys = list(dict.fromkeys(["method_detail", "kernel", *sizes, *differing]))
            changed.append(
                ChangedLayer(prefix, {key: old.get(key) for key in keys}, {key: layer[key] for key in keys})
            )
    totals, notes = before.get("totals") or {}, before.get("notes") or []
    was, now = _settings(before), _settings(new)
    # What an older version did not save cannot be compared.
    changes = {key: [was[key], value] for key, value in now.items() if key in was and was[key] != value}
    return PlanDifference(
        {key: changes.pop(key) for key in SETTINGS if key in changes},
        {
            key: [totals.get(key, 0), value]
            for key, value in new["totals"].items()
            if totals.get(key) != value
        },
        changed,
        [prefix for prefix in new_layers if prefix not in old_layers],
        [prefix for prefix in old_layers if prefix not in new_layers],
        changes,
        [[note for note in notes if note not in after.notes], [n for n in after.notes if n not in notes]],
    )


def _settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """List a plan's settings by name, those of its objects as "kv_cache.tokens"."""
    found = {key: plan[key] for key in (*SETTINGS, "definition") if key in plan}
    for name, keys in OBJECTS.items():
        value = plan.get(name)
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": value.get(key) for key in keys if key in value}
        elif name in plan:
            found |= {f"{name}.{key}": None for key in keys}
    routing = plan.get("routing")
    if isinstance(routing, list):
        kernels = (entry.get("kernel") for entry in routing if isinstance(entry, Mapping))
        found["routing.kernel"] = sorted({str(kernel) for kernel in kernels})
    return found
