"""A checkpoint into any module that exists already: by its resolvers, its packed parts, and exact names.

`pymllm.load_model` builds the model itself and reads each rank's slices alone; this one is for modules that are made
elsewhere. The accounting is the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pymllm.errors import CheckpointError, ConfigError, nearest
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.loader import Written
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.weights.report import LoadReport, Problem, TensorRecord, raise_problems
from pymllm.weights.resolution import (
    ResolvedWeight,
    apply_resolved_weight,
    find_direct,
    find_packed,
    resolve_weight_spec,
)

HINTS = 20


def load_model(model: nn.Module, config: Any) -> LoadReport:
    """Load a checkpoint into `model`, then pack every layer that has a quant_method.

    config: what has the checkpoint's folder or hub id as `model` or `path`, or that itself; resolvers are given it.
    The order for each tensor: the modules' resolvers, the model's `packed_modules_mapping`, exact names; then the
    patterns of its `skipped_tensors`, with their reasons. Raises ONE CheckpointError for all tensors without a place
    and all parameters without a tensor, before any is read; and one if an element is written twice or not at all.
    """
    report = LoadReport()
    started = time.perf_counter()
    with open_checkpoint(resolve_model_path(_folder(config))) as checkpoint:
        places, problems = _places(model, config, checkpoint)
        raise_problems(str(checkpoint.path), problems)
        _count_writes(model)
        for name, place in places.items():
            tensor = checkpoint.tensors[name]
            if isinstance(place, str) or place.skip:
                reason = place if isinstance(place, str) else "the model's resolver skips it"
                report.tensors.append(TensorRecord(name, "skipped", 0, reason))
                continue
            _load(name, place, tensor.read())
            report.tensors.append(TensorRecord(name, "loaded", tensor.nbytes))
            report.bytes_read += tensor.nbytes
    _check_written(model, str(checkpoint.path))
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
            report.methods[method.describe()] += 1
    report.seconds = time.perf_counter() - started
    report.final_bytes = sum(param.nbytes for param in model.parameters())
    return report


def _folder(config: Any) -> str | Path:
    if isinstance(config, (str, Path)):
        return config
    for name in ("model", "path"):
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(found, (str, Path)):
            return found
    raise ConfigError(
        "the config does not say where the checkpoint is",
        code="config-value",
        expected="a folder or hub id as its `model` or `path`",
        found=type(config).__name__,
    )


def _places(
    model: nn.Module, config: Any, checkpoint: Checkpoint
) -> tuple[dict[str, ResolvedWeight | str], list[Problem]]:
    """For each tensor its place, or the reason to skip it; and everything that is wrong."""
    packed = getattr(model, "packed_modules_mapping", {})
    skipped: Mapping[str, str] = getattr(model, "skipped_tensors", {})
    places: dict[str, ResolvedWeight | str] = {}
    problems: list[Problem] = []
    stray = []
    for name in checkpoint.tensors:
        place = (
            resolve_weight_spec(model, name, config)
            or find_packed(model, packed, name)
            or find_direct(model, name)
            or next((why for pattern, why in skipped.items() if re.fullmatch(pattern, name)), None)
        )
        if place is None:
            stray.append(name)
        else:
            places[name] = place
    known = dict(model.named_parameters())
    for name in stray:
        hint = nearest(name, known) if len(problems) < HINTS else ""
        problems.append(Problem("unexpected", name, f"unexpected, nothing takes it. {hint}".strip()))
    resolved = [place for place in places.values() if isinstance(place, ResolvedWeight)]
    if not any(place.loader is not None and place.param is None for place in resolved):
        reached = {id(place.param) for place in resolved}
        for name, param in known.items():
            if id(param) not in reached:
                hint = nearest(name, stray) if len(problems) < HINTS else ""
                problems.append(Problem("missing", name, f"missing, no tensor fills it. {hint}".strip()))
    return places, problems


def _count_writes(model: nn.Module) -> None:
    """Every parameter's writes are counted from now on."""
    for param in model.parameters():
        param.written = Written()  # type: ignore[attr-defined]


def _load(name: str, place: ResolvedWeight, loaded: Tensor) -> None:
    """Carry out one place.  A loader that counts nothing itself is taken to fill the parameter that it names."""
    before = None if place.param is None else place.param.written.elements  # type: ignore[attr-defined]
    try:
        apply_resolved_weight(place, loaded)
    except CheckpointError as error:
        error.tensor = name
        error.args = (str(error),)
        raise
    if place.loader is not None and place.param is not None:
        count_loader(name, place.param, before or 0)


def count_loader(name: str, param: nn.Parameter, before: int) -> None:
    """After a loader of its own filled `param`: count that as a write of all of it, unless it counted."""
    written: Any = param.written  # type: ignore[attr-defined]
    if written.elements == before:
        written.add(tuple(slice(0, side) for side in param.shape), name)


def _check_written(model: nn.Module, path: str) -> None:
    problems = []
    for name, param in model.named_parameters():
        slots = getattr(param, "slots", None)
        wanted = param.numel() if slots is None else sum(slot.elements for slot in slots)
        found = param.written.elements  # type: ignore[attr-defined]
        if found not in (wanted, param.numel()):
            text = f"half-written; expected {wanted} elements, found {found}"
            problems.append(Problem("half-written", name, text))
    raise_problems(path, problems)
