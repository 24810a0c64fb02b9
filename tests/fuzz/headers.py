"""Headers of safetensors files: lengths, names, types, shapes, offsets, and the text itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save

from pymllm.weights.safetensors_file import SafetensorsFile

from .inputs import NASTY, Input, changed_bytes, changed_json, chosen, dumped

FILE = "model.safetensors"
LENGTHS = (0, 1, 7, 8, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)


def split(data: bytes) -> tuple[Any, bytes]:
    """Return a file's header and what follows it."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    """Write a file with this header, whatever it says.  length: what it claims to be."""
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


class Headers:
    """Opening a file, and reading every tensor of it."""

    name = "headers"

    def prepare(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        tensors = {
            "a": torch.randn(2, 3, generator=generator),
            "b.weight": torch.randn(4, generator=generator).half(),
            "c": torch.arange(6, dtype=torch.int32).reshape(3, 2),
            "d.empty": torch.zeros(0, 4),
            "e": torch.tensor(3, dtype=torch.int64),
        }
        self.data = save(tensors, metadata={"format": "pt"})
        self.expected = tensors

    def inputs(self) -> SearchStrategy[Input]:
        return chosen((4, self._texts), (1, self._lengths), (2, self._bytes), (1, self._kept))

    def _input(self, data: bytes, changed: str, meaning: Any = "breaks") -> Input:
        return Input("five tensors", {FILE: data}, changed, meaning)

    def _texts(self) -> SearchStrategy[Input]:
        header, rest = split(self.data)
        types = tuple(
            json.dumps(name) for name in ("F32", "F16", "I32", "F8_E4M3", "F4", "U8", "BOOL", "C64", "x")
        )
        # Names and types that are right ones say something else; so does metadata.
        made = changed_json(header, NASTY + types)
        return made.map(lambda new: self._input(joined(new[0], rest), new[1], "means"))

    def _lengths(self) -> SearchStrategy[Input]:
        header, rest = split(self.data)
        text = dumped(header)
        near = st.integers(-16, 16).map(lambda by: max(0, len(text) + by))
        lengths = st.one_of(st.sampled_from(LENGTHS), near).filter(lambda length: length != len(text))
        return lengths.map(lambda length: self._input(joined(text, rest, length), f"length {length}"))

    def _bytes(self) -> SearchStrategy[Input]:
        return changed_bytes(self.data).map(lambda new: self._input(new[0], new[1], "means"))

    @st.composite
    @staticmethod
    def _reordered(draw: Any, self: Headers) -> Input:
        header, rest = split(self.data)
        keys = draw(st.permutations(list(header)))
        text = json.dumps(
            {key: header[key] for key in keys}, indent=draw(st.sampled_from((None, 1)))
        ).encode()
        text += b" " * draw(st.integers(0, 9))
        return self._input(joined(text, rest), "keys in another order, spaces", "keeps")

    def _kept(self) -> SearchStrategy[Input]:
        return Headers._reordered(self)

    def judge(self, given: Input, folder: Path) -> bool:
        with SafetensorsFile.open(given.write(folder) / FILE) as file:
            read = {info.name: info.read() for info in file.tensors.values()}
        return read.keys() == self.expected.keys() and all(
            read[name].dtype == value.dtype and torch.equal(read[name], value)
            for name, value in self.expected.items()
        )
