"""The one line about kernels that are slow where faster ones could run: native ones that are missing, or references."""

from __future__ import annotations

import logging
from collections import Counter

from pymllm.kernels.native.extension import native_missing_reason
from pymllm.planning.plan import Plan, PlannedLayer

logger = logging.getLogger("pymllm")

REFERENCE = "reference"
LOOK = "`pymllm plan MODEL --why` says what each layer runs, and why."

_told: set[tuple[str, str]] = set()


def describe_slow_kernels(plan: Plan, asked: frozenset[str] = frozenset()) -> str | None:
    """Say which layers run slow kernels on a CPU, why, and what helps; None where none does.

    asked: the kernels that the user has chosen by name, which is no surprise.
    """
    if plan.device.partition(":")[0] != "cpu":
        return None
    missing = native_missing_reason()
    bare = [layer for layer in plan.layers if missing is not None and _lacks_native(layer)]
    if bare:
        return f"{_count(bare, plan)}: {missing}."
    slow = [layer for layer in plan.layers if layer.kernel == REFERENCE and REFERENCE not in asked]
    if not slow:
        return None
    reasons = Counter(why for layer in slow if (why := _why_no_native(layer)))
    said = f", as {reasons.most_common(1)[0][0]}" if reasons else ""
    return f"{_count(slow, plan)}, which is right but slow{said}. {LOOK}"


def tell_slow_kernels(plan: Plan, asked: frozenset[str] = frozenset()) -> None:
    """Log a warning of what `describe_slow_kernels` says, once for each model in a process."""
    said = describe_slow_kernels(plan, asked)
    if said is not None and (plan.model, said) not in _told:
        _told.add((plan.model, said))
        logger.warning("%s: %s", plan.model, said)


def _lacks_native(layer: PlannedLayer) -> bool:
    return any(
        refused["kernel"].startswith("native") and refused["cause"] == "installation"
        for refused in layer.refused
    )


def _why_no_native(layer: PlannedLayer) -> str | None:
    """Return why the native kernel that comes closest does not run a layer: the refusal of the last one asked."""
    whys = [
        f"{refused['kernel']} {refused['why']}"
        for refused in layer.refused
        if refused["kernel"].startswith("native") and not refused["why"].startswith("multiplies")
    ]
    return whys[-1] if whys else None


def _count(layers: list[PlannedLayer], plan: Plan) -> str:
    kernels = Counter((layer.kind, layer.kernel, layer.method_detail) for layer in layers)
    listed = ", ".join(
        f"{count} x {kind} ({method}) by {kernel}" for (kind, kernel, method), count in kernels.most_common(3)
    )
    more = "" if len(kernels) <= 3 else ", ..."
    return f"{len(layers)} of {len(plan.layers)} layers run slow kernels ({listed}{more})"
