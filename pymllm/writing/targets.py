"""The layers that a config group or a rule of a checkpoint's config is for, in as few words as are exact."""

from __future__ import annotations

import re
from collections.abc import Iterable


def patterns_for(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Write targets that mean just these of all layers: `re:` patterns over layer numbers where exact, else the names.

    model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj → re:model\\.layers\\.\\d+\\.mlp\\.up_proj$
    """
    wanted, others = list(names), set(everything) - set(names)
    targets: dict[str, None] = {}
    for name in wanted:
        pattern = r"\d+".join(re.escape(part) for part in re.split(r"(?<=\.)\d+(?=\.)", name)) + "$"
        covers_others = pattern not in targets and any(re.match(pattern, other) for other in others)
        exact = covers_others or pattern == re.escape(name) + "$"
        targets[name if exact else f"re:{pattern}"] = None
    return list(targets)
