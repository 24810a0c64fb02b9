"""The room for a KV cache: what a device has beside the weights, before they are loaded, and measured when they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from pymllm.engine.graphs import scales_span_rows, why_not_captured
from pymllm.engine.kv_memory import CacheSize, choose_cache_size
from pymllm.engine.working_memory import (
    estimate_step_bytes,
    largest_step,
    measure_step_bytes,
    working_bytes,
)
from pymllm.kernels.hardware import probe_device
from pymllm.loading.prepare import Prepared
from pymllm.planning.plan import Plan, PlannedLayer
from pymllm.weights.memory import available_memory


@dataclass(frozen=True)
class Room:
    """The bytes of a device.

    available: that are free beside the weights; None: nobody knows.  working: of these, what steps take.
    """

    available: int | None
    working: int = 0


def assume_room(
    prepared: Prepared,
    weight_bytes: int,
    layers: Iterable[PlannedLayer],
    max_model_len: int | None,
    captured: bool,
    exact: bool,
) -> Room:
    """Return the room beside weights that are not loaded yet: what is free now, less what they will take.

    captured, exact: of decoding steps, as for `working_bytes`.
    It is not known of another machine's device, nor where the weights do not fit, which loading refuses.
    """
    execution, model = prepared.execution, prepared.model
    free = available_memory(execution.device)
    left = None if free is None or free <= weight_bytes else free - weight_bytes
    if execution.device == "cpu":
        return Room(left)
    tokens = largest_step(model, max_model_len)
    widest = max((sum(layer.shape_local[-2:]) for layer in layers if layer.kind == "linear"), default=0)
    step = estimate_step_bytes(tokens, widest, execution.dtype.itemsize)
    return Room(left, _working(prepared, step, tokens, captured, exact))


def measure_cache(
    plan: Plan, prepared: Prepared, max_model_len: int | None, kv_memory: int | str | None
) -> Plan:
    """Return the plan of a model that is loaded, with the cache for which its GPU has room: the least of all ranks.

    On a CPU it stays as it is.  All ranks call this at a time.
    """
    device = probe_device(prepared.execution.device)
    if device.type == "cpu" or prepared.model.why_no_text is not None:
        return plan
    model = prepared.model
    tokens = largest_step(model, max_model_len)
    step = measure_step_bytes(model, device.torch_device, tokens)
    captured = (model.why_not_repeated or why_not_captured(model)) is None
    working = _working(prepared, step, tokens, captured, scales_span_rows(model))
    rooms = [Room(*room) for room in prepared.parallel.exchange([available_memory(device.spec), working])]
    least = min(rooms, key=lambda room: (room.available or 0) - room.working)
    size = size_cache(prepared, plan.totals, least, max_model_len, kv_memory)
    return replace(plan, kv_cache=asdict(size))


def size_cache(
    prepared: Prepared,
    totals: Mapping[str, int],
    room: Room,
    max_model_len: int | None,
    kv_memory: int | str | None,
) -> CacheSize:
    """Choose the size of the model's cache for the room that there is.  max_model_len, kv_memory: as there."""
    return choose_cache_size(
        prepared.model.max_length,
        totals["kv_cache_bytes_per_token"],
        room.available,
        max_model_len=max_model_len,
        kv_memory=kv_memory,
        state_bytes=totals["state_bytes_per_request"],
        block_length=prepared.model.strategy.block_length,
        on_gpu=prepared.execution.device != "cpu",
        working=room.working,
    )


def _working(prepared: Prepared, step_bytes: int, tokens: int, captured: bool, exact: bool) -> int:
    model = prepared.model
    return working_bytes(
        step_bytes,
        tokens,
        model.config.size("vocab_size"),
        captured=captured,
        exact=exact,
        widths=model.strategy.widths,
    )
