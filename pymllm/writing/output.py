"""A checkpoint folder that appears whole: steps are kept as they finish, and final files are moved in at the end.

Until then everything lies in OUT/.unfinished:

    request.json        what was asked for; another request is refused
    journal.jsonl       a line for each finished step: its piece, the piece's size and hash, what is in it
    piece-*.safetensors
    shards.json         once all steps are there: which tensors go into which final file
    model-*.safetensors, config.json, ...   final files, moved to OUT one by one, config.json last

A run that was stopped, however, goes on where it was; a piece that is not what the journal says is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.weights.safetensors_file import DTYPES, SafetensorsFile, TensorInfo

STAGING = ".unfinished"
REQUEST, JOURNAL, SHARDS, FINAL = "request.json", "journal.jsonl", "shards.json", "final.json"
LAST = "config.json"  # without it a folder is no checkpoint
COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """A finished step, kept in a file.

    step: its name.  file: within the staging folder.  digest: BLAKE2b of the file.
    notes: what the step's maker wants to know of it later; JSON.
    """

    step: str
    file: str
    nbytes: int
    digest: str
    notes: Any


class Output:
    """An output folder in the making.  It is a context manager, as only one process may work on it.

    folder: where the checkpoint will be.  staging: where everything lies until then.  pieces: finished steps, by name.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], *, restart: bool = False) -> None:
        """Start, or go on with, `request` (JSON).  ConfigError if the folder holds anything else.

        restart: throw away what an unfinished run of any request has left.
        """
        self.folder, self.staging = self._places(folder)
        self._prepare(dict(request), restart)
        self.pieces: dict[str, Piece] = {}

    @property
    def path(self) -> Path:
        """The folder or file that is written, as the user names it."""
        return self.folder

    def _places(self, out: Path) -> tuple[Path, Path]:
        """Return the folder of the final files, and the one where everything lies until then."""
        return out, out / STAGING

    def __enter__(self) -> Output:
        self._lock = open(self.staging / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(
                "another process is writing this checkpoint", code="out-busy", file=str(self.path)
            ) from None
        if not (self.staging / SHARDS).exists():
            self._read_journal()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _prepare(self, request: dict[str, Any], restart: bool) -> None:
        """Make the staging folder with the request in it, or check that it holds the same one."""
        self._check_kind()
        if restart:
            shutil.rmtree(self.staging, ignore_errors=True)
        found = self.staging / REQUEST
        if found.is_file():
            before = json.loads(found.read_text(encoding="utf-8"))
            changed = [key for key in {**before, **request} if before.get(key) != request.get(key)]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"the folder holds an unfinished run of another request: {', '.join(changed)} changed",
                    code="resume-changed",
                    file=str(self.path),
                    expected=f"{key} = {before.get(key)!r}",
                    found=repr(request.get(key)),
                    fix="Ask for the same again to go on, add --restart to begin anew, or write elsewhere.",
                )
            return
        self._check_empty()
        self.staging.mkdir(parents=True, exist_ok=True)
        _write_text(found, json.dumps(request, indent=1))

    def _check_kind(self) -> None:
        """Refuse an output that is there as something else.  ConfigError "out-exists"."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(
                "the output is a file",
                code="out-exists",
                file=str(self.folder),
                expected="a folder, or a path where nothing is yet",
            )

    def _check_empty(self) -> None:
        """Refuse to begin where anything is.  ConfigError "out-exists"."""
        there = self.folder.iterdir() if self.folder.exists() else ()
        others = [path.name for path in there if path.name != STAGING]
        if others:
            raise ConfigError(
                "the output folder is not empty",
                code="out-exists",
                file=str(self.folder),
                found=", ".join(sorted(others)[:5]),
                fix="Write to a new folder, or remove this one first.",
            )

    def _read_journal(self) -> None:
        """Find the finished steps whose pieces are what the journal says; its torn last line is passed over."""
        journal = self.staging / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                piece = Piece(**json.loads(line))
                if _is(self.staging / piece.file, piece.nbytes, piece.digest):
                    self.pieces[piece.step] = piece

    @property
    def assembling(self) -> bool:
        """True once all steps are done, so that only final files are still to be made."""
        return (self.staging / SHARDS).exists()

    def add(self, step: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Keep what a step has made, for good."""
        file = f"piece-{hashlib.blake2b(step.encode(), digest_size=8).hexdigest()}.safetensors"
        path = self.staging / file
        save_file(dict(tensors), path.with_suffix(".tmp"))
        digest = _digest(path.with_suffix(".tmp"))
        rename(path.with_suffix(".tmp"), path)
        piece = Piece(step, file, path.stat().st_size, digest, notes)
        with open(self.staging / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(piece.__dict__) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.pieces[step] = piece

    def save_state(self, tensors: Mapping[str, Tensor], step: str) -> None:
        """Keep tensors that the steps after `step` need, in place of those kept before."""
        path = self.staging / "state.safetensors"
        save_file(dict(tensors), path.with_suffix(".tmp"), {"step": step})
        rename(path.with_suffix(".tmp"), path)

    def load_state(self) -> tuple[dict[str, Tensor], str] | None:
        """Return what `save_state` kept last, and its step; None if there is nothing, or nothing whole."""
        path = self.staging / "state.safetensors"
        if not path.is_file():
            return None
        with SafetensorsFile.open(path) as file:
            return {name: info.read() for name, info in file.tensors.items()}, file.metadata["step"]

    def forget_after(self, steps: Sequence[str]) -> None:
        """Drop all pieces but those of `steps`, so that the others are made again."""
        self.pieces = {step: piece for step, piece in self.pieces.items() if step in steps}
        lines = "".join(json.dumps(piece.__dict__) + "\n" for piece in self.pieces.values())
        _write_text(self.staging / JOURNAL, lines)

    @property
    def publishing(self) -> bool:
        """True once all final files are made, so that they only have to be moved."""
        return (self.staging / FINAL).exists()

    def assemble(self, order: Sequence[str], shard_bytes: int, notes: Any) -> None:
        """Put the tensors of all pieces, in the order of steps, into final files of about `shard_bytes`.

        notes: what the files beside the weights are made of, should they be made by another run (`assembly_notes`).
        """
        plan_file = self.staging / SHARDS
        if not plan_file.exists():
            tensors = [
                [info.name, self.pieces[step].file]
                for step in order
                for info in SafetensorsFile.open(self.staging / self.pieces[step].file).tensors.values()
            ]
            sizes = {
                info.name: info.nbytes
                for step in order
                for info in SafetensorsFile.open(self.staging / self.pieces[step].file).tensors.values()
            }
            shards = _divide(tensors, sizes, shard_bytes)
            _write_text(plan_file, json.dumps({"shards": shards, "sizes": sizes, "notes": notes}))
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
        shards = plan["shards"]
        for index, shard in enumerate(shards):
            target = self.staging / self._shard_name(index, len(shards))
            if not target.exists():  # else it is whole: it is renamed only then
                self._join(shard, target)
            needed = {file for later in shards[index + 1 :] for _, file in later}
            for file in {file for _, file in shard} - needed:
                (self.staging / file).unlink(missing_ok=True)
        if len(shards) > 1:
            weight_map = {
                name: shard_name(index, len(shards))
                for index, shard in enumerate(shards)
                for name, _ in shard
            }
            index_json = {"metadata": {"total_size": sum(plan["sizes"].values())}, "weight_map": weight_map}
            _write_text(
                self.staging / "model.safetensors.index.json", json.dumps(index_json, indent=2) + "\n"
            )

    def _shard_name(self, index: int, count: int) -> str:
        """Name a weight file."""
        return shard_name(index, count)

    def _join(self, shard: list[list[str]], target: Path) -> None:
        """Copy tensors of pieces, as [name, piece], into one weight file."""
        _join(self.staging, shard, target)

    def assembly_notes(self) -> Any:
        """Return the notes that `assemble` was given, by this run or an earlier one."""
        return json.loads((self.staging / SHARDS).read_text(encoding="utf-8"))["notes"]

    def add_file(self, name: str, content: bytes) -> None:
        """Add a final file beside the weights, or in a folder there."""
        path = self.staging / f"{name}.tmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        rename(path, self.staging / name)

    def publish(self) -> list[str]:
        """Move the final files to their place, config.json last, and remove all else.  Returns their names."""
        known = self.staging / FINAL
        if not known.exists():
            own = {REQUEST, JOURNAL, SHARDS, FINAL, "lock", "state.safetensors"}
            names = [
                path.name
                for path in self.staging.iterdir()
                if path.name not in own and not path.name.startswith("piece-") and path.suffix != ".tmp"
            ]
            _write_text(known, json.dumps(sorted(names, key=lambda name: (name == LAST, name))))
        names = json.loads(known.read_text(encoding="utf-8"))
        for name in names:
            if (self.staging / name).exists():  # else an earlier run has moved it
                os.replace(self.staging / name, self.folder / name)
        _sync_folder(self.folder)
        done = self.staging.with_name(f"{self.staging.name}-done")
        # Renamed at once: a half-removed folder would look like something to go on with.
        os.replace(self.staging, done)
        shutil.rmtree(done)
        return list(names)


def shard_name(index: int, count: int) -> str:
    """Name a weight file as transformers does.  index: from 0, of `count` files."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _divide(tensors: list[list[str]], sizes: Mapping[str, int], shard_bytes: int) -> list[list[list[str]]]:
    """Divide [tensor, file] entries into consecutive runs of at most `shard_bytes`, or of one tensor that is larger."""
    shards: list[list[list[str]]] = [[]]
    filled = 0
    for entry in tensors:
        if shards[-1] and filled + sizes[entry[0]] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += sizes[entry[0]]
    return shards


def _join(folder: Path, shard: list[list[str]], target: Path) -> None:
    """Copy tensors of pieces into one safetensors file, widest elements first, so that all are aligned."""
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(SafetensorsFile.open(folder / name)) for name in {f for _, f in shard}
        }
        infos = [files[file].tensors[name] for name, file in shard]
        infos.sort(key=lambda info: -DTYPES[info.dtype_name][0])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for info in infos:
            header[info.name] = {
                "dtype": info.dtype_name,
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            position += info.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        temporary = target.with_suffix(".tmp")
        with open(temporary, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for info in infos:
                for chunk in chunks_of(info):
                    out.write(chunk)
        rename(temporary, target)


def chunks_of(info: TensorInfo) -> Iterator[bytes]:
    """Yield the bytes of a tensor as they lie in its file."""
    with open(info.file.path, "rb") as file:
        file.seek(info.start)
        left = info.nbytes
        while left:
            chunk = file.read(min(COPY_BYTES, left))
            left -= len(chunk)
            yield chunk


def _is(path: Path, nbytes: int, digest: str) -> bool:
    """Return whether the file is there, of this size and with this content."""
    return path.is_file() and path.stat().st_size == nbytes and _digest(path) == digest


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def rename(temporary: Path, path: Path) -> None:
    """Give a finished file its name once its bytes are on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    """Write a file that is there as a whole, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    rename(temporary, path)


def storable(tensor: Tensor) -> Tensor:
    """Copy a tensor as safetensors takes it: on the CPU, contiguous, with memory of its own."""
    return tensor.detach().to("cpu").contiguous().clone(memory_format=torch.contiguous_format)
