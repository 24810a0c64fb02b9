"""Packed weights that are kept beside the checkpoint's: the next start maps them, and packs nothing.

What a load leaves in the model's modules is written as it is (`packed_file.py`), under a key of all that it depends on
(`packed_key.py`). The next load rehearses on the meta device, which gives the same modules without data, and puts the
mapped tensors in their places (`packed_state.py`). Where anything differs, it loads as usual.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pymllm.errors import ConfigError, PymllmError
from pymllm.kernels.native.extension import native_available
from pymllm.loading.packed_file import UnfitError, map_packed, write_packed
from pymllm.loading.packed_key import describe_decisions, digest, key_of, name_of
from pymllm.loading.packed_state import Rehearsal, alike, tensors_of
from pymllm.loading.prepare import Prepared
from pymllm.weights.report import LoadReport, TensorRecord

logger = logging.getLogger("pymllm")

SUFFIX = ".packed"
LEAST = 256 << 20  # bytes of packed weights; less is packed in little time
MOST_KEPT = 50 << 30  # bytes of all models together, or a fifth of the disk
ABANDONED = 24 * 3600  # seconds, after which a file that was never finished is removed


def cache_folder() -> Path:
    """Return the folder of the kept weights: $PYMLLM_CACHE, else pymllm/packed in the user's cache folder.

    ConfigError where the system knows no home of the user.
    """
    own = os.environ.get("PYMLLM_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "pymllm" / "packed"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep packed weights in", code="packed-cache", fix="Set PYMLLM_CACHE."
        ) from error


class PackedCache:
    """The kept weights of one model that is about to be loaded.

    folder: where.  asked: whether the user has named it; else small models and full disks are left alone.
    """

    def __init__(self, prepared: Prepared, folder: Path, asked: bool) -> None:
        self.prepared, self.folder, self.asked = prepared, folder, asked
        self.threads = max(1, torch.get_num_threads())
        self.rehearsal = Rehearsal(prepared.model)
        try:
            self.rehearsal.finish(unit.holder for unit in prepared.units)
            self.lines, self.tensors = describe_decisions(prepared)
        except BaseException:
            self.rehearsal.leave()
            raise
        decisions = digest(self.lines)
        self.path = folder / f"{name_of(prepared, decisions)}{SUFFIX}"
        self.key = key_of(prepared, decisions)

    @classmethod
    def of(cls, prepared: Prepared, choice: str | Path) -> PackedCache | None:
        """Make the cache of a model, by a load that is rehearsed.

        choice: "auto", "off" or a folder.  None: nothing is kept of this model, nor taken.
        The model is then as it was; else it is as it will be, until `take` or `leave`.
        """
        reason = None
        if str(choice) == "off":
            reason = "it was not asked for"
        elif prepared.execution.device != "cpu":
            reason = "the model is not on a CPU"
        elif not native_available():
            reason = "there are no native kernels"
        elif any(place.resolved is not None for unit in prepared.units for place in unit.placements):
            reason = "the model resolves its tensors itself"
        if reason is None:
            try:
                asked = str(choice) != "auto"
                return cls(prepared, Path(choice) if asked else cache_folder(), asked)
            except (PymllmError, RuntimeError, ValueError, TypeError, NotImplementedError, OSError) as error:
                reason = f"it cannot be known without the weights how they are packed ({error})"
        logger.debug("packed weights are not kept: %s", reason)
        return None

    def take(self) -> LoadReport | None:
        """Put the kept weights in their places.  None: there are none that fit, and the model is as it was built."""
        started = time.perf_counter()
        try:
            if not self.path.exists():
                raise UnfitError("")
            _check_folder(self.folder)
            data, account = map_packed(self.path, self.key, self.threads)
            if account["tensors_described"] != self.tensors or len(data) != len(self.tensors):
                raise UnfitError("it has other tensors than the model")
            self._put(data)
        except (UnfitError, OSError, ValueError, KeyError, TypeError) as error:
            if str(error):
                logger.warning("%s is not used, and is made anew: %s", self.path, error)
            self.rehearsal.leave()
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)
        report = _read_report(account["report"])
        report.taken_from = str(self.path)
        report.seconds = time.perf_counter() - started
        return report

    def _put(self, data: list[torch.Tensor]) -> None:
        found = list(tensors_of(self.prepared.model))
        if any(item.tensor.dtype is not new.dtype for item, new in zip(found, data, strict=True)):
            raise UnfitError("it has other tensors than the model")
        made: dict[int, torch.Tensor] = {}
        for item, new in zip(found, data, strict=True):
            old = item.tensor
            if id(old) not in made:
                made[id(old)] = alike(old, new)
            item.put(made[id(old)])

    def keep(self, report: LoadReport) -> None:
        """Write what has been loaded.  Where it cannot be, this is a warning."""
        model = self.prepared.model
        found = [item.tensor for item in tensors_of(model)]
        if not self.asked and report.final_bytes < LEAST:
            return
        decided = digest(self.lines)
        if (
            digest(describe_decisions(self.prepared)[0]) != decided
            or any(tensor.device.type != "cpu" for tensor in found)
            or key_of(self.prepared, decided) != self.key
        ):
            logger.debug("packed weights are not kept: they depend on what is in the checkpoint's tensors")
            return
        try:
            nbytes = sum(tensor.untyped_storage().nbytes() for tensor in found)
            _make_room(self.folder, self.path, nbytes, self.asked)
            account = {
                "tensors_described": self.tensors,
                "report": _write_report(report),
                "model": os.path.abspath(self.prepared.checkpoint.path),
            }
            # Processes of two containers that share the folder may have one number.
            own = self.path.with_name(f"{self.path.stem}.{secrets.token_hex(8)}.tmp")
            try:
                written = write_packed(own, self.key, found, account, self.threads)
                # Others may have it mapped for days: it is replaced and removed, but never written to.
                os.chmod(own, 0o400)
                os.replace(own, self.path)
            finally:
                own.unlink(missing_ok=True)
        except UnfitError as error:
            logger.warning("packed weights are not kept: %s", error)
        except (OSError, PymllmError) as error:
            logger.warning("packed weights are not kept in %s: %s", self.folder, error)
        else:
            report.kept_in = str(self.path)
            logger.warning(
                "kept %.1f GB of packed weights for the next start: %s (to be rid of it, delete the file; "
                "--packed-cache off keeps none)",
                written / 1e9,
                self.path,
            )


def kept_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Return the kept files of a folder, and their sizes and times, the one used longest ago first."""
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                if path.name.endswith(SUFFIX):
                    found.append((path, path.stat()))
    return sorted(found, key=lambda item: item[1].st_mtime)


def _check_folder(folder: Path) -> None:
    """Raise UnfitError for a folder that is not this user's alone to write to."""
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise UnfitError(f"its folder belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnfitError("other users may write to its folder")


def _make_room(folder: Path, path: Path, nbytes: int, asked: bool) -> None:
    """Make the folder, and remove what was used longest ago.  UnfitError where there is no room.

    asked: whether the user has named the folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(folder)
    for left in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    disk = shutil.disk_usage(folder)
    # Who names a folder has chosen its disk.
    spare = 0 if asked else max(nbytes, disk.total // 10)
    if disk.free - nbytes < spare:
        raise UnfitError(
            f"the disk of {folder} has {disk.free / 1e9:.1f} GB free; "
            f"they take {nbytes / 1e9:.1f} GB" + ("" if asked else ", and a tenth of it stays free")
        )
    most = min(MOST_KEPT, disk.total // 5)
    if nbytes > most:
        raise UnfitError(f"they take {nbytes / 1e9:.1f} GB, and {most / 1e9:.1f} GB is the most that is kept")
    others = [(other, found) for other, found in kept_files(folder) if other != path]
    total = nbytes + sum(found.st_size for _, found in others)
    for other, found in others:
        if total <= most:
            break
        with contextlib.suppress(OSError):
            other.unlink()
        total -= found.st_size


def _write_report(report: LoadReport) -> dict[str, Any]:
    return {**asdict(report), "loaded": sorted(report.loaded), "methods": dict(report.methods)}


def _read_report(stored: dict[str, Any]) -> LoadReport:
    tensors = [TensorRecord(**record) for record in stored["tensors"]]
    return LoadReport(
        tensors,
        set(stored["loaded"]),
        Counter(stored["methods"]),
        bytes_read=stored["bytes_read"],
        final_bytes=stored["final_bytes"],
    )
