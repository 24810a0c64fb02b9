"""Folders of several files: index and shards that say different things, names that lead elsewhere, links, sizes.

A case is the text of an index, where it is changed, and what is done to the files beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from .inputs import NASTY, Input, Meaning, changed_bytes, changed_json, chosen
from .subjects import Checkpoints, llama, logits

INDEX = "model.safetensors.index.json"
DEEDS = "deeds.json"
SHARDS = [f"model-{part:05d}-of-00003.safetensors" for part in (1, 2, 3)]
NAMES = (
    *("../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "model.safetensors", "x"),
    *(
        f"./{SHARDS[0]}",
        f"{SHARDS[0]}/",
        f"{SHARDS[0]}\0",
        "\x1b[31m.safetensors",
        "a" * 300,
        "\ud800",
        "config.json",
    ),
    *(SHARDS[0].upper(), f" {SHARDS[0]}", SHARDS[1], SHARDS[2], "~/model.safetensors", "C:\\x", "model.bin"),
)
DEED_WAYS = (
    "drop",
    "cut",
    "grow",
    "rename",
    "copy",
    "link",
    "loop",
    "empty",
    "folder",
    "fifo",
    "swap",
    "away",
    "other",
)


class Index:
    """A small model in three shards: planned, loaded, run."""

    name = "index"

    def prepare(self, folder: Path) -> None:
        folder = folder.resolve()
        self.outside = folder / "outside.safetensors"
        write = partial(llama, writer="none", shards=3)
        self.checkpoints = Checkpoints(folder, {"three": write, "other": partial(write, seed=1)})

    def inputs(self) -> SearchStrategy[Input]:
        folder = self.checkpoints.folder("three")
        self.index = json.loads((folder / INDEX).read_text())
        self.sizes = {name: (folder / name).stat().st_size for name in SHARDS}
        return chosen((3, self._texts), (4, self._names), (5, self._deeds), (1, self._bytes), (1, self._kept))

    def _input(self, files: dict[str, bytes], changed: str, meaning: Meaning = "breaks") -> Input:
        return Input("three", files, changed, meaning)

    def _texts(self) -> SearchStrategy[Input]:
        nasty = NASTY + tuple(json.dumps(name) for name in NAMES)
        return changed_json(self.index, nasty).map(lambda new: self._input({INDEX: new[0]}, new[1]))

    @st.composite
    @staticmethod
    def _named(draw: Any, self: Index) -> Input:
        """Send a tensor, or all of a shard's, to another file; name one that there is not; forget one."""
        index = json.loads(json.dumps(self.index))
        names = list(index["weight_map"])
        name = draw(st.sampled_from(names))
        file = draw(st.sampled_from(NAMES))
        way = draw(st.sampled_from(("one", "all", "add", "forget", "rename", "none")))
        if way == "one":
            index["weight_map"][name] = file
        elif way == "all":
            old = index["weight_map"][name]
            index["weight_map"] = {key: file if at == old else at for key, at in index["weight_map"].items()}
        elif way == "add":
            index["weight_map"][draw(st.sampled_from((f"{name}x", "lm_head.bias", "", "x", "\x1b[0m")))] = (
                file
            )
        elif way == "forget":
            del index["weight_map"][name]
        elif way == "rename":
            index["weight_map"][f"{name}x"] = index["weight_map"].pop(name)
        else:
            index["weight_map"] = draw(st.sampled_from(({}, [], None, {"x": file}, [[name, file]])))
        return self._input({INDEX: json.dumps(index).encode()}, f"{way} {name} {file!r:.40}")

    def _names(self) -> SearchStrategy[Input]:
        return Index._named(self)

    @st.composite
    @staticmethod
    def _done(draw: Any, self: Index) -> Input:
        deeds = []
        for _ in range(draw(st.sampled_from((1, 1, 2)))):
            deed: dict[str, Any] = {"way": draw(st.sampled_from(DEED_WAYS))}
            deed["file"] = draw(st.sampled_from((*SHARDS, INDEX, "config.json")))
            size = self.sizes.get(deed["file"], 500)
            deed["by"] = draw(st.sampled_from((1, 4, 8, 9, 64, size // 2, size - 8, size)))
            deed["to"] = draw(st.sampled_from((*SHARDS, INDEX, "model.safetensors", "extra.safetensors")))
            deeds.append(deed)
        # Other bytes of the right size are another model; a file that nothing names says nothing.
        ways = {deed["way"] for deed in deeds}
        last = {deed["file"]: deed["way"] for deed in deeds}  # a link is gone once its file is written anew
        other = ways & {"other", "swap"} and "away" not in last.values()
        told = "; ".join(" ".join(map(str, deed.values())) for deed in deeds)
        return self._input({DEEDS: json.dumps(deeds).encode()}, told, "means" if other else "breaks")

    def _deeds(self) -> SearchStrategy[Input]:
        return Index._done(self)

    def _bytes(self) -> SearchStrategy[Input]:
        data = (self.checkpoints.folder("three") / INDEX).read_bytes()
        return changed_bytes(data).map(lambda new: self._input({INDEX: new[0]}, new[1]))

    @st.composite
    @staticmethod
    def _reordered(draw: Any, self: Index) -> Input:
        keys = draw(st.permutations(list(self.index["weight_map"])))
        index = {"weight_map": {key: self.index["weight_map"][key] for key in keys}}
        if draw(st.booleans()):
            index["metadata"] = draw(st.sampled_from(({}, {"total_size": 1}, {"x": "y"})))
        text = json.dumps(index, indent=draw(st.sampled_from((None, 1)))).encode()
        return self._input({INDEX: text}, "names in another order", "keeps")

    def _kept(self) -> SearchStrategy[Input]:
        return Index._reordered(self)

    def judge(self, given: Input, folder: Path) -> bool:
        if not self.outside.exists():
            shutil.copy(self.checkpoints.folder("three") / SHARDS[0], self.outside)
        inside = folder / "model"
        inside.mkdir()
        # What a name leads to that leaves the folder is a right shard: it must not be read all the same.
        shutil.copy(self.outside, folder / "outside.safetensors")
        files = {name: data for name, data in given.files.items() if name != DEEDS}
        path = self.checkpoints.copy("three", inside, files)
        for deed in json.loads(given.files.get(DEEDS, b"[]")):
            self._do(path, deed)
        answered = torch.equal(logits(path), self.checkpoints.answer("three", logits))
        # A link that leads out of the folder is not followed, whatever lies there.
        inner = path.resolve()
        return answered and all(file.resolve().parent == inner for file in path.iterdir())

    def _do(self, folder: Path, deed: dict[str, Any]) -> None:
        """Do something to a file.  A file is a link to the good one, so that a changed one is written anew."""
        way, file, to = deed["way"], folder / deed["file"], folder / deed["to"]
        if not file.is_file():
            return
        data = file.read_bytes()
        if way not in ("copy", "swap"):
            file.unlink()
        if way == "cut":
            file.write_bytes(data[: -deed["by"]])
        elif way == "grow":
            file.write_bytes(data + bytes(deed["by"]))
        elif way in ("rename", "copy") and not to.is_dir():
            to.unlink(missing_ok=True)
            to.write_bytes(data)
        elif way == "link":
            (folder / "real").write_bytes(data)
            file.symlink_to("real")
        elif way == "away":
            beyond = folder.parent / "beyond"
            beyond.write_bytes(data)
            file.symlink_to(beyond)
        elif way == "loop":
            file.symlink_to(file.name)
        elif way == "empty":
            file.touch()
        elif way == "folder":
            file.mkdir()
        elif way == "fifo":
            os.mkfifo(file)
        elif way == "swap" and to.is_file():
            other = to.read_bytes()
            for path, content in ((file, other), (to, data)):
                path.unlink(missing_ok=True)
                path.write_bytes(content)
        elif way == "other":
            other_file = self.checkpoints.folder("other") / file.name
            file.write_bytes(other_file.read_bytes())
