"""What packed weights depend on, as one key: another key, and they are packed anew."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import pymllm
from pymllm.kernels.native.extension import native, probe
from pymllm.loading.packed_state import describe_modules, describe_tensors
from pymllm.loading.prepare import Prepared

SMALL = 4 << 20  # bytes; settings have no more, and are read whole
SAMPLE = 64 << 10  # bytes from the beginning and the end of a file of weights
SETTINGS = (".json", ".py", ".txt", ".model", ".jinja")
# A file of text for people, or of a tokenizer, is no setting of weights.
NO_SETTINGS = ("tokenizer", "vocab", "merges", "special_tokens", "README", "chat_template")


def digest(lines: Iterable[str]) -> str:
    """Return the digest of lines of text."""
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line.encode("utf-8", "surrogateescape"))
        sha.update(b"\n")
    return sha.hexdigest()


def describe_decisions(prepared: Prepared) -> tuple[list[str], list[list[Any]]]:
    """Return what has been decided of a model, and its tensors.  The model: as it is once loaded, without data."""
    tensors = describe_tensors(prepared.model)
    lines = [
        f"execution {prepared.execution!r}",
        f"rank {prepared.parallel.rank} of {prepared.parallel.size}, {prepared.parallel.expert_parallel}",
        *describe_modules(prepared.model),
        *(json.dumps(item) for item in tensors),
        *(
            f"{unit.name} {p.param} {p.tensor.name} {p.tensor.dtype} {p.slot.source} {p.slot.target}"
            for unit in prepared.units
            for p in unit.placements
        ),
        *(f"{record.name} {record.status} {record.reason}" for record in prepared.records),
    ]
    return lines, tensors


def name_of(prepared: Prepared, decisions: str) -> str:
    """Return the name under which a model is kept: of its path and of what was decided, not of its content."""
    return digest([os.path.realpath(prepared.checkpoint.path), decisions])[:32]


def key_of(prepared: Prepared, decisions: str) -> str:
    """Return the key: of the decisions, the checkpoint's files, the machine, and the code that packs."""
    checkpoint = prepared.checkpoint
    lines = [
        f"decisions {decisions}",
        f"config {json.dumps(checkpoint.config, sort_keys=True, default=repr)}",
        f"versions {pymllm.__version__} {torch.__version__}",
        *_machine(),
        *_files(checkpoint.path, [file.path for file in checkpoint.files]),
        *_code(),
    ]
    return digest(lines)


def _machine() -> Iterator[str]:
    cpu = probe()
    yield f"cpu {cpu.arch} {cpu.best_path} {cpu.brand} {sorted(cpu.features)}"
    yield f"caches {cpu.l1d_bytes} {cpu.l2_bytes} {cpu.l3_bytes}"


def _files(path: Path, weights: Iterable[Path]) -> Iterator[str]:
    """Say which files there are: the settings by their content, the weights by what changes with each write to them."""
    for file in weights:
        yield f"weights {file.name} {_identity(file)} {_samples(file)}"
    folder = path if path.is_dir() else path.parent
    if not path.is_dir():
        return
    for file in sorted(folder.iterdir()):
        if file.suffix in SETTINGS and not file.name.startswith(NO_SETTINGS) and file.is_file():
            if file.stat().st_size <= SMALL:
                yield f"settings {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"
            else:
                yield f"settings {file.name} {_identity(file)}"


def _identity(file: Path) -> str:
    """Return what changes with a write: size, times and inode.  The system alone sets the time of a change (ctime)."""
    found = os.stat(file)
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_dev} {found.st_ino}"


def _samples(file: Path) -> str:
    """Return the digest of a file's beginning, where its header is, and of its end."""
    with open(file, "rb") as opened:
        sha = hashlib.sha256(opened.read(SAMPLE))
        size = os.fstat(opened.fileno()).st_size
        opened.seek(max(0, size - SAMPLE))
        sha.update(opened.read(SAMPLE))
    return sha.hexdigest()


@functools.cache
def _code() -> tuple[str, ...]:
    """Say which code packs: every source of the package, and the native library, by what changes with a write."""
    root = Path(pymllm.__file__).parent
    found = [f"{file.relative_to(root)} {_identity(file)}" for file in sorted(root.rglob("*.py"))]
    return (*found, f"native {_identity(Path(native().__file__))}")
