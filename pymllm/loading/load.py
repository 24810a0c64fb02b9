"""From a checkpoint to a model whose weights are packed, a layer at a time, as `prepare` has decided."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from pymllm.disk import names_files
from pymllm.errors import CheckpointError, ConfigError
from pymllm.kernels.hardware import current, probe_device
from pymllm.kernels.native.thread_count import lower_to_quota_once
from pymllm.loading.boundary import reading_checkpoint
from pymllm.loading.match import Placement, Unit
from pymllm.loading.packed_cache import PackedCache
from pymllm.loading.prepare import Prepared
from pymllm.loading.progress import progress_bar
from pymllm.loading.reading import Reader, Reading
from pymllm.loading.stored import check_placed, check_skipped
from pymllm.models.language_model import LanguageModel
from pymllm.weights.hub import download_weights
from pymllm.weights.memory import is_out_of_memory, keep_freed_memory, out_of_memory, return_freed_memory
from pymllm.weights.module_loading import count_loader
from pymllm.weights.report import LoadReport, TensorRecord
from pymllm.weights.resolution import apply_resolved_weight
from pymllm.weights.spec import ExpertsShape, LinearShape

logger = logging.getLogger("pymllm")

# Stored bytes that are loaded between two returns of freed memory: what a unit has freed serves the next, and each
# page that is returned has to be touched anew.
TRIM_BYTES = 128 << 20


@names_files
def load_prepared(
    prepared: Prepared, *, progress: bool | None = None, packed_cache: str | Path = "off"
) -> LanguageModel:
    """Read, slice and pack what `prepare` has decided, a layer at a time.

    progress: whether to show a bar on the first rank; None: on a terminal.
    packed_cache: where packed weights are kept for the next start: "auto", a folder, or "off".
    Returns the model, which carries `load_report` and `prepared`.
    Raises CheckpointError for values that cannot be right, ConfigError for a device that is not here.
    """
    where = probe_device(prepared.execution.device)
    if not where.present:
        raise ConfigError(
            f"{where} can be planned for, but not run on: {where.spec} names no device of this machine",
            code="device",
            expected="a device that is here, such as auto",
            found=where.spec,
        )
    lower_to_quota_once()
    download_weights(prepared.checkpoint)
    cache = PackedCache.of(prepared, packed_cache)
    report = None if cache is None else cache.take()
    if report is None:
        with current(where.torch_device):
            report = _load_units(prepared, progress)
        if cache is not None:
            cache.keep(report)
    model = prepared.model
    model.requires_grad_(False)
    model.eval()
    model.load_report, model.prepared = report, prepared  # type: ignore[assignment]
    logger.info(report.summary())
    if prepared.draft is not None:
        second = load_prepared(prepared.draft, progress=progress, packed_cache=packed_cache)
        model.strategy = replace(model.strategy, draft=second)
    return model


def _load_units(prepared: Prepared, progress: bool | None) -> LoadReport:
    """Read, slice and pack every unit.  Returns the report."""
    report = LoadReport(tensors=list(prepared.records))
    started = time.perf_counter()
    untrimmed = 0
    keep_freed_memory()
    total = sum(placement.tensor.nbytes for unit in prepared.units for placement in unit.placements)
    show = False if prepared.parallel.rank else progress
    device = torch.device(prepared.execution.device)
    with (
        prepared.checkpoint,
        progress_bar("Loading", total, show) as advance,
        Reader(device) as reader,
    ):
        try:
            with reading_checkpoint(prepared.checkpoint.config_file):
                check_skipped(prepared.skipped)
            for unit, following in zip_longest(prepared.units, prepared.units[1:]):
                # Another rank may have failed meanwhile.
                prepared.parallel.check()
                # What a module's own resolver raises is its own.
                own = any(placement.resolved is not None for placement in unit.placements)
                with (
                    nullcontext()
                    if own
                    else reading_checkpoint(prepared.checkpoint.config_file, counted=True)
                ):
                    _load_unit(unit, following, prepared, report, reader)
                nbytes = sum(placement.tensor.nbytes for placement in unit.placements)
                untrimmed += nbytes
                if untrimmed >= TRIM_BYTES or following is None:
                    return_freed_memory()
                    untrimmed = 0
                advance(nbytes)
        except CheckpointError as error:
            if error.tensor is not None:  # by its name in the file
                error.tensor = prepared.checkpoint.stored_as.tensor(error.tensor)
                error.args = (str(error),)
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            needed = sum(placement.tensor.nbytes for unit in prepared.units for placement in unit.placements)
            raise out_of_memory(
                f"loading {needed} bytes of tensors",
                error,
                fix="`pymllm plan` says what the model takes. Choose smaller formats (--quant '**.layers.**=int4'), "
                "divide the model over ranks (--tensor-parallel-size), or free memory.",
            ) from error
    report.seconds = time.perf_counter() - started
    return report


def _load_unit(
    unit: Unit, following: Unit | None, prepared: Prepared, report: LoadReport, reader: Reader
) -> None:
    """Read a holder's tensors, check them, pack them, and add them to the report.

    following: the unit that is loaded next; None: this is the last one.
    """
    params = {(id(p.module), p.param): p.module for p in unit.placements}
    reading = reader.reading(unit)
    read: Counter[str] = Counter()  # one tensor may hold several parts of the layer
    for placement in unit.placements:
        name = placement.tensor.name
        first = name not in read
        read[name] += (
            _read(placement, reading) if placement.resolved is None else _read_resolved(placement, first)
        )
    for tensor, nbytes in read.items():
        reason = f"also read for {unit.name}, which is tied to it" if tensor in report.loaded else ""
        report.tensors.append(TensorRecord(tensor, "tied" if reason else "loaded", nbytes, reason))
    report.loaded |= read.keys()
    report.bytes_read += read.total()
    for (_, name), module in params.items():
        _check_all_written(module, name)
    del reading
    if following is not None:
        reader.begin(following)  # is read while this one is packed
    holder = unit.holder
    holder.finish()
    if holder.borrows_from is not None:
        tied = f"{holder.borrows_from.prefix}.weight"
        report.tensors.append(TensorRecord(tied, "tied", 0, f"shared with {unit.name}"))
    for method in holder.methods():
        report.methods[method.describe()] += 1
    report.final_bytes += holder.loaded_bytes() + holder.kept_bytes()


def _read(placement: Placement, reading: Reading) -> int:
    """Read this rank's slice into its parameter.  Returns the bytes read."""
    slot, tensor = placement.slot, placement.tensor
    reading.finish(placement)
    _check_values(placement, slot.view(getattr(placement.module, placement.param).data))
    return slot.elements * tensor.nbytes // max(math.prod(tensor.shape), 1)


def _read_resolved(placement: Placement, first: bool) -> int:
    """Do what a resolver says of a tensor, the first time that one of its placements is read.

    Returns the bytes read: none after the first time.
    """
    tensor, said = placement.tensor, placement.resolved
    assert said is not None
    param = getattr(placement.module, placement.param)
    if first:
        before = param.written.elements
        apply_resolved_weight(said, tensor.read().to(param.device))
        if said.loader is not None:
            count_loader(tensor.name, param, before)
    _check_values(placement, placement.slot.view(param.data))
    return tensor.nbytes if first else 0


def _check_values(placement: Placement, target: Tensor) -> None:
    """Refuse values that cannot be right.  target: what the tensor has filled of its parameter."""
    shape = getattr(placement.module, "shape", None)
    check_placed(placement, target, shape if isinstance(shape, (LinearShape, ExpertsShape)) else None)


def _check_all_written(module: nn.Module, name: str) -> None:
    """Refuse a parameter, or this rank's share of it, that was not written in full."""
    param = getattr(module, name)
    slots = param.slots
    wanted = param.numel() if slots is None else sum(slot.elements for slot in slots)
    if param.written.elements != wanted:
        raise CheckpointError(
            "part of the parameter was not written",
            code="half-written",
            tensor=name if slots is None else slots[0].tensor,
            expected=f"{wanted} elements",
            found=str(param.written.elements),
        )
