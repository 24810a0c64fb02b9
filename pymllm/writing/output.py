"""A checkpoint folder that appears whole: steps are kept as they finish, and final files are moved in at the end.

Until then everything lies in OUT/.unfinished:

    request.json        what was asked for; another request is refused
    journal.jsonl       a line for each finished step: its piece, the piece's size and hash, what is in it
    piece-*.safetensors
    shards.json         once all steps are there: which tensors go into which final file
    model-*.safetensors, config.json, ...   final files, moved to OUT one by one, config.json last

A run that was stopped, however, goes on where it was; a piece that is not what the journal says is made again. What
could not be written is one ConfigError, and nothing of it stays; what a killed process was writing ends in .tmp, and
goes with the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymllm.disk import check_path, reading, sync_folder, write_whole, writing
from pymllm.errors import CheckpointError, ConfigError
from pymllm.weights.folder import UNFINISHED as STAGING
from pymllm.weights.safetensors_file import SafetensorsFile
from pymllm.writing.safetensors_container import COPY_BYTES, join_tensors, write_tensors

REQUEST, JOURNAL, SHARDS, FINAL = "request.json", "journal.jsonl", "shards.json", "final.json"
LAST = "config.json"  # without it a folder is no checkpoint
AGAIN = "Then ask for the same again: what is done already is kept."


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
        check_path(folder)
        self.folder, self.staging = self._places(folder)
        with writing(self.path, again=AGAIN):
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
        with contextlib.ExitStack() as stack, writing(self.staging / "lock", again=AGAIN):
            self._lock = stack.enter_context(open(self.staging / "lock", "w"))
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "another process is writing this checkpoint", code="out-busy", file=str(self.path)
                ) from None
            if not self._has(SHARDS):
                self._read_journal()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing was written there.
        with contextlib.suppress(OSError):
            self._lock.close()

    def _prepare(self, request: dict[str, Any], restart: bool) -> None:
        """Make the staging folder with the request in it, or check that it holds the same one."""
        self._check_kind()
        # An earlier run was killed when it had finished.
        _remove(self._done)
        if restart:
            _remove(self.staging)
        found = self.staging / REQUEST
        if found.is_file():
            before = self._read_own(REQUEST)
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

    @property
    def _done(self) -> Path:
        """The staging folder's name while it is removed: half of one would look like something to go on with."""
        return self.staging.with_name(f"{self.staging.name}-done")

    def _has(self, name: str) -> bool:
        with reading(self.staging / name):
            return (self.staging / name).exists()

    def _read_own(self, name: str) -> Any:
        """Read a JSON object that this or an earlier run has written.  ConfigError "resume-damaged"."""
        with reading(self.staging / name):
            raw = (self.staging / name).read_bytes()
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, (dict, list)):
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> ConfigError:
        return ConfigError(
            "this file of an unfinished run is damaged",
            code="resume-damaged",
            file=str(self.staging / name),
            fix="Begin anew: add --restart.",
        )

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
        """Find the finished steps whose pieces are what the journal says; its torn last line is cut off."""
        entries, whole = self._journal_entries()
        for piece in entries:
            if self._is_whole(piece):
                self.pieces[piece.step] = piece
        if not whole:
            # The next line must not be joined to half of one.
            self.forget_after(list(self.pieces))

    def _journal_entries(self) -> tuple[list[Piece], bool]:
        """Return the pieces that the journal names, and whether its last line was written to its end."""
        journal = self.staging / JOURNAL
        with reading(journal):
            raw = journal.read_bytes() if journal.is_file() else b""
        entries = []
        for line in raw.splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                entries.append(Piece(**json.loads(line)))
        return entries, not raw or raw.endswith(b"\n")

    def _is_whole(self, piece: Piece) -> bool:
        """Return whether a piece's file is there, of this size and with this content."""
        path = self.staging / piece.file
        with reading(path):
            return path.is_file() and path.stat().st_size == piece.nbytes and _digest(path) == piece.digest

    @property
    def assembling(self) -> bool:
        """True once all steps are done, so that only final files are still to be made."""
        return self._has(SHARDS)

    def add(self, step: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Keep what a step has made, for good."""
        file = f"piece-{hashlib.blake2b(step.encode(), digest_size=8).hexdigest()}.safetensors"
        path = self.staging / file
        write_tensors(path, tensors, again=AGAIN)
        with reading(path):
            piece = Piece(step, file, path.stat().st_size, _digest(path), notes)
        line = json.dumps(piece.__dict__).encode() + b"\n"
        with (
            writing(self.staging / JOURNAL, len(line), again=AGAIN),
            open(self.staging / JOURNAL, "ab") as journal,
        ):
            journal.write(line)
            journal.flush()
            os.fsync(journal.fileno())
        self.pieces[step] = piece

    def save_state(self, tensors: Mapping[str, Tensor], step: str) -> None:
        """Keep tensors that the steps after `step` need, in place of those kept before."""
        write_tensors(self.staging / "state.safetensors", tensors, {"step": step}, again=AGAIN)

    def load_state(self) -> tuple[dict[str, Tensor], str] | None:
        """Return what `save_state` kept last, and its step; None if there is nothing, or nothing whole."""
        path = self.staging / "state.safetensors"
        with reading(path):
            if not path.is_file():
                return None
        try:
            with SafetensorsFile.open(path) as file:
                return {name: info.read() for name, info in file.tensors.items()}, file.metadata["step"]
        except (CheckpointError, KeyError):
            return None

    def forget_after(self, steps: Sequence[str]) -> None:
        """Drop all pieces but those of `steps`, so that the others are made again."""
        self.pieces = {step: piece for step, piece in self.pieces.items() if step in steps}
        lines = "".join(json.dumps(piece.__dict__) + "\n" for piece in self.pieces.values())
        _write_text(self.staging / JOURNAL, lines)

    @property
    def publishing(self) -> bool:
        """True once all final files are made, so that they only have to be moved."""
        return self._has(FINAL)

    def assemble(self, order: Sequence[str], shard_bytes: int, notes: Any) -> None:
        """Put the tensors of all pieces, in the order of steps, into final files of about `shard_bytes`.

        notes: what the files beside the weights are made of, should they be made by another run (`assembly_notes`).
        """
        with writing(self.path, again=AGAIN):
            self._assemble(order, shard_bytes, notes)

    def _assemble(self, order: Sequence[str], shard_bytes: int, notes: Any) -> None:
        plan_file = self.staging / SHARDS
        known: dict[str, Piece] = {}
        if plan_file.exists():
            known = {piece.file: piece for piece in self._journal_entries()[0]}
        else:
            tensors, sizes = [], {}
            for step in order:
                file = self.pieces[step].file
                for info in SafetensorsFile.open(self.staging / file).tensors.values():
                    tensors.append([info.name, file])
                    sizes[info.name] = info.nbytes
            shards = _divide(tensors, sizes, shard_bytes)
            _write_text(plan_file, json.dumps({"shards": shards, "sizes": sizes, "notes": notes}))
        plan = self._read_own(SHARDS)
        shards = plan["shards"]
        for index, shard in enumerate(shards):
            target = self.staging / self._shard_name(index, len(shards))
            if not target.exists():  # else it is whole: it is renamed only then
                for file in {file for _, file in shard} & known.keys():
                    # Time has passed since it was written.
                    if not self._is_whole(known[file]):
                        raise self._damaged(file)
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
        join_tensors(self.staging, shard, target, again=AGAIN)

    def assembly_notes(self) -> Any:
        """Return the notes that `assemble` was given, by this run or an earlier one."""
        return self._read_own(SHARDS)["notes"]

    def add_file(self, name: str, content: bytes) -> None:
        """Add a final file beside the weights, or in a folder there."""
        path = self.staging / name
        with writing(path, again=AGAIN):
            path.parent.mkdir(exist_ok=True)
        write_whole(path, [content], len(content), again=AGAIN)

    def publish(self) -> list[str]:
        """Move the final files to their place, config.json last, and remove all else.  Returns their names."""
        known = self.staging / FINAL
        with writing(self.path, again=AGAIN):
            if not known.exists():
                own = {REQUEST, JOURNAL, SHARDS, FINAL, "lock", "state.safetensors"}
                names = [
                    path.name
                    for path in self.staging.iterdir()
                    if path.name not in own and not path.name.startswith("piece-") and path.suffix != ".tmp"
                ]
                _write_text(known, json.dumps(sorted(names, key=lambda name: (name == LAST, name))))
            names = self._read_own(FINAL)
            for name in names:
                if (self.staging / name).exists():  # else an earlier run has moved it
                    os.replace(self.staging / name, self.folder / name)
            sync_folder(self.folder)
            os.replace(self.staging, self._done)
        # The checkpoint is there: what stays of the rest is removed when something is written here again.
        with contextlib.suppress(OSError):
            _remove(self._done)
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


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(COPY_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    raw = text.encode()
    write_whole(path, [raw], len(raw), again=AGAIN)


def _remove(folder: Path) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def storable(tensor: Tensor) -> Tensor:
    """Copy a tensor as safetensors takes it: on the CPU, contiguous, with memory of its own."""
    return tensor.detach().to("cpu").contiguous().clone(memory_format=torch.contiguous_format)
