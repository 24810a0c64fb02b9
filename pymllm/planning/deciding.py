"""The decisions of a load, with their plan, taken by every rank alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pymllm.loading.agreement import prepare_alike
from pymllm.loading.prepare import Prepared, prepare
from pymllm.parallel import Parallel
from pymllm.planning.make_plan import check_fits, make_plan
from pymllm.planning.plan import Plan
from pymllm.planning.slow_kernels import tell_slow_kernels
from pymllm.weights.hub import download_weights


def decide(
    parallel: Parallel,
    model: str | Path | None,
    options: Mapping[str, Any],
    *,
    adapters: Mapping[str, str | Path] | None = None,
    check_memory: bool = True,
    before_loading: Callable[[Prepared, Plan], object] | None = None,
    **room: Any,
) -> tuple[Prepared, Plan]:
    """Decide how a model is loaded, and whether it fits; on several ranks, fail on all of them if one does.

    options: of `prepare`.  adapters: those that are loaded afterwards.  room: of `make_plan`.
    before_loading: what else is to be checked; it may raise.
    """

    def make() -> tuple[Prepared, Plan]:
        prepared = prepare(model, **options)
        plan = make_plan(prepared, **room)
        if check_memory:
            check_fits(prepared, plan)
        if before_loading is not None:
            before_loading(prepared, plan)
        if parallel.size > 1:  # ranks compare what lies in their files
            download_weights(prepared.checkpoint)
        return prepared, plan

    prepared, plan = prepare_alike(parallel, make, lambda made: made[0], adapters)
    tell_slow_kernels(plan, frozenset(dict(prepared.execution.kernels).values()))
    return prepared, plan
