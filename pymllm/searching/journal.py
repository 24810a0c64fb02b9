"""The measurements of a search, in a file that grows a line at a time: a search that was stopped goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from pymllm.disk import check_path, reading, write_whole, writing
from pymllm.errors import ConfigError
from pymllm.weights.checkpoint import Checkpoint

SCHEMA_VERSION = 1
AGAIN = "The same search goes on from what is measured."
SAMPLE, SAMPLES = 1 << 16, 16  # of each weight file: so many bytes at so many places


class Journal:
    """Measured numbers by key, all of which are on disk.

    file: its path; it is made if there is none.  about: what the numbers depend on (model, text, ...), as JSON values.
    restart: whether to throw away what the file has about anything else.
    ConfigError for a file that is no journal, is damaged, or is about something else.
    """

    def __init__(self, file: Path, about: Mapping[str, Any], *, restart: bool = False) -> None:
        check_path(file)
        self.file = file
        self._about = {"journal": SCHEMA_VERSION, **about}
        self._values: dict[str, float] = {}
        self._stream: TextIO | None = None
        try:
            text = file.read_text(encoding="utf-8") if file.exists() and not restart else ""
            whole = text[: text.rfind("\n") + 1]  # a line that was being written is not one
            if text and not whole and not _header(self._about).startswith(text):
                raise self._damaged(1, text)
            if whole:
                self._read(whole.splitlines())
            file.parent.mkdir(parents=True, exist_ok=True)
            if whole != text or not whole:
                # A new file, or one less the half line.
                content = (whole or _header(self._about)).encode()
                write_whole(file, [content], len(content), again=AGAIN)
            self._stream = file.open("a", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the measurements cannot be kept: {error}",
                code="search-journal",
                file=str(file),
                fix="Name another file: --journal FILE.",
            ) from None

    def _read(self, lines: list[str]) -> None:
        about = self._parse(1, lines[0])
        if about.get("journal") is None:
            raise self._damaged(1, lines[0])
        if about != self._about:
            differs = [
                f"{key} {about.get(key)!r} instead of {value!r}"
                for key, value in self._about.items()
                if about.get(key) != value
            ]
            raise ConfigError(
                "the file holds measurements of another search",
                code="search-journal",
                file=str(self.file),
                found="; ".join(differs) or "settings that this version does not have",
                fix="Name another file (--journal FILE), or throw these away (--restart).",
            )
        for number, line in enumerate(lines[1:], 2):
            entry = self._parse(number, line)
            key, value = entry.get("key"), entry.get("value")
            if not isinstance(key, str) or not isinstance(value, float) or math.isnan(value) or value < 0:
                raise self._damaged(number, line)
            self._values[key] = value

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            raise self._damaged(number, line) from None
        if not isinstance(entry, dict):
            raise self._damaged(number, line)
        return entry

    def _damaged(self, number: int, line: str) -> ConfigError:
        return ConfigError(
            f"line {number} is not what a search writes",
            code="search-journal",
            file=str(self.file),
            expected="one JSON object, as a search appends them",
            found=repr(line[:80]),
            fix="Name another file (--journal FILE), or throw this one away (--restart).",
        )

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> float:
        return self._values[key]

    def add(self, key: str, value: float) -> None:
        """Write a number down.  It is rounded, so that what another number of threads computes is the same."""
        value = float(f"{value:.6g}")
        assert self._stream is not None and not math.isnan(value)
        line = json.dumps({"key": key, "value": value}) + "\n"
        with writing(self.file, len(line), again=AGAIN):
            self._stream.write(line)
            self._stream.flush()
        self._values[key] = value

    def close(self) -> None:
        """Close the file.  What was added stays readable here."""
        if self._stream is not None:
            # All is written, but for what could not be.
            with contextlib.suppress(OSError):
                self._stream.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header(about: Mapping[str, Any]) -> str:
    return json.dumps(about, ensure_ascii=False) + "\n"


def default_journal(about: Mapping[str, Any]) -> Path:
    """Return the file that a search keeps its measurements in unless it is told another, below ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "pymllm" / "search" / f"{digest(json.dumps(about, sort_keys=True).encode())}.jsonl"


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a name for a checkpoint's content: a hash of its config, its headers and samples of its weight files."""
    hashed = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    for name, tensor in checkpoint.tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.nbytes}\n".encode())
    for path in sorted({tensor.file.path for tensor in checkpoint.tensors.values()}):
        with reading(path), path.open("rb") as stream:
            size = path.stat().st_size
            for place in range(SAMPLES):
                stream.seek(max(size - SAMPLE, 0) * place // (SAMPLES - 1))
                hashed.update(stream.read(SAMPLE))
    return hashed.hexdigest()[:16]


def digest(data: bytes) -> str:
    """Return a short hash of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]
