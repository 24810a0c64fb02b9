"""Loading a checkpoint into any module that exists already: by its resolvers, its packed parts, and exact names.

`pymllm.load_model` builds the model itself and reads only the rank's own slices; `load_model` here is for modules that
are made elsewhere. Both count every write.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pymllm.errors import CheckpointError, ConfigError, counted, nearest
from pymllm.weights.checkpoint import Checkpoint
from pymllm.weights.loader import slots_of, track, written_of
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.weights.report import HINTS, LoadReport, Problem, TensorRecord, raise_problems
from pymllm.weights.resolution import (
    ResolvedWeight,
    apply_resolved_weight,
    find_direct,
    find_packed,
    resolve_weight_spec,
)


def load_model(model: nn.Module, config: Any) -> LoadReport:
    """Load a checkpoint into `model`, then pack every layer that has a quant_method.

    config: the checkpoint's folder or hub id, or an object or mapping that has it as `model` or `path`; resolvers are
    given it.  Each tensor's place comes from the first of these that has one: the modules' resolvers, the model's
    `packed_modules_mapping`, exact names, the patterns of the model's `skipped_tensors` with their reasons.
    Raises ONE CheckpointError for all tensors without a place and all parameters without a tensor, before any tensor
    is read; and one if an element is written twice or not at all.
    """
    report = LoadReport()
    started = time.perf_counter()
    with open_checkpoint(resolve_model_path(_folder(config))) as checkpoint:
        places, problems = _places(model, config, checkpoint)
        raise_problems(str(checkpoint.path), problems)
        for param in model.parameters():
            track(param, slots_of(param))
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
        found=f"a {type(config).__name__} without them",
        fix="Pass the folder or hub id itself, or set config.model.",
    )


def _places(
    model: nn.Module, config: Any, checkpoint: Checkpoint
) -> tuple[dict[str, ResolvedWeight | str], list[Problem]]:
    """Find the place of each tensor, or the reason to skip it; and everything that is wrong."""
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
        problems.append(
            Problem("unexpected", name, f"unexpected, the model has no place for it. {hint}".strip())
        )
    resolved = [place for place in places.values() if isinstance(place, ResolvedWeight)]
    if not any(place.loader is not None and place.param is None for place in resolved):
        reached = {id(place.param) for place in resolved}
        for name, param in known.items():
            if id(param) not in reached:
                hint = nearest(name, stray) if len(problems) < HINTS else ""
                text = f"missing, no tensor of the checkpoint fills this parameter. {hint}"
                problems.append(Problem("missing", name, text.strip()))
    return places, problems


def _load(name: str, place: ResolvedWeight, loaded: Tensor) -> None:
    """Put a tensor in its place.  A loader that counts no write itself is taken to fill the place's parameter."""
    before = 0 if place.param is None else written_of(place.param).elements
    try:
        apply_resolved_weight(place, loaded)
    except CheckpointError as error:
        error.tensor = name
        error.args = (str(error),)
        raise
    if place.loader is not None and place.param is not None:
        count_loader(name, place.param, before)


def count_loader(name: str, param: nn.Parameter, before: int) -> None:
    """Count what a resolver's loader did as one write of all of `param`, unless the loader counted writes itself.

    name: the tensor that it loaded.  before: how many elements were written before it ran.
    """
    written = written_of(param)
    if written.elements == before:
        written.add(tuple(slice(0, side) for side in param.shape), name)


def _check_written(model: nn.Module, path: str) -> None:
    problems = []
    for name, param in model.named_parameters():
        slots, found = slots_of(param), written_of(param).elements
        wanted = param.numel() if slots is None else sum(slot.elements for slot in slots)
        if found not in (wanted, param.numel()):
            text = f"half-written; expected {counted(wanted, 'element')} to be written, found {found}"
            problems.append(Problem("half-written", name, text))
    raise_problems(path, problems)
