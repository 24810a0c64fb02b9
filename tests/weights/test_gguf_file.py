"""GGUF headers: what the `gguf` package writes is read, and every fault is one clear error before a tensor is."""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from pymllm.errors import CheckpointError
from pymllm.weights import gguf_file
from pymllm.weights.gguf_file import GGUFFile

from ..gguf_files import finish

U32, STRING, ARRAY, U64 = 4, 8, 9, 10


def string(text) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name, sizes, kind, offset) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@dataclass
class Raw:
    """A file byte by byte: F32 "a" of 8 bytes, padded to 32, then F16 "b" of 8."""

    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    entry_count: int | None = None
    entries: list[bytes] = field(
        default_factory=lambda: [entry("general.architecture", STRING, string("llama"))]
    )
    tensors: list[bytes] = field(
        default_factory=lambda: [tensor("a", (2,), 0, 0), tensor("b", (2, 2), 1, 32)]
    )
    data: bytes = bytes(32 + 8)

    def write(self, path: Path) -> Path:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        entries = len(self.entries) if self.entry_count is None else self.entry_count
        raw = self.magic + struct.pack("<IQQ", self.version, tensors, entries)
        raw += b"".join(self.entries) + b"".join(self.tensors)
        path.write_bytes(raw + bytes(-len(raw) % 32) + self.data)
        return path


def code_of(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        GGUFFile.open(path)
    assert caught.value.file == str(path)
    return caught.value.code


def test_what_the_gguf_package_writes_is_read_exactly(tmp_path):
    path, rng = tmp_path / "m.gguf", np.random.default_rng(0)
    floats, halves = (
        rng.standard_normal((3, 5)).astype(np.float32),
        rng.standard_normal((7,)).astype(np.float16),
    )
    blocks = gguf.quantize(rng.standard_normal((4, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in ((writer.add_uint8, 255), (writer.add_int64, -(2**40)), (writer.add_float32, 0.5)):
        add(f"x.{add.__name__}", value)
    writer.add_bool("x.yes", True)
    writer.add_array("x.words", ["é", "", "▁z"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_tensor("floats", floats)
    writer.add_tensor("halves", halves)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    finish(writer)
    file = GGUFFile.open(path)
    read = file.metadata
    assert (read["x.add_uint8"], read["x.add_int64"], read["x.add_float32"]) == (255, -(2**40), 0.5)
    assert (
        read["x.yes"] is True
        and read["x.words"] == ["é", "", "▁z"]
        and read["x.numbers"].tolist() == [1, -2, 3]
    )
    assert torch.equal(file.tensors["floats"].read(), torch.from_numpy(floats))
    assert torch.equal(file.tensors["halves"].read((slice(2, 5),)), torch.from_numpy(halves[2:5]))
    info = file.tensors["blocks"]
    assert (info.dtype_name, info.dtype, info.shape) == ("Q4_0", torch.uint8, (4, 36))
    assert torch.equal(info.read((slice(1, 3), slice(18, 36))), torch.from_numpy(blocks[1:3, 18:36].copy()))


def test_every_type_has_the_block_of_the_gguf_package():
    theirs = {
        kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind])
        for kind in gguf.GGMLQuantizationType
        if kind in gguf.GGML_QUANT_SIZES
    }
    theirs[42] = ("Q2_0", 64, 18)  # newer than the package
    refused = {theirs.pop(number)[0] for number in gguf_file.REFUSED_TYPES if number in theirs}
    assert {number: kind[:3] for number, kind in gguf_file.TYPES.items()} == theirs
    assert refused == {"Q8_1", "Q8_K"}


@pytest.mark.parametrize("number, name", ((9, "Q8_1"), (15, "Q8_K"), (31, "Q4_0_4_4"), (38, "IQ4_NL_8_8")))
def test_a_type_that_files_do_not_have_is_refused_by_name(number, name, tmp_path):
    path = Raw(tensors=[tensor("a", (256,), number, 0)], data=bytes(512)).write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=f"files do not have.*{name}") as caught:
        GGUFFile.open(path)
    assert caught.value.code == "header-dtype" and caught.value.tensor == "a"


@pytest.mark.parametrize("last", (True, False))
def test_q2_0_in_the_blocks_of_a_fork_is_refused_by_its_sizes(last, tmp_path):
    """The fork had 34 bytes for 128 values under the number of llama.cpp's 18 for 64."""
    size = 8 * 2048 // 128 * 34
    tensors = [tensor("a", (2048, 8), 42, 0)] + ([] if last else [tensor("b", (8,), 0, size)])
    path = Raw(tensors=tensors, data=bytes(size + (0 if last else 32))).write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="128 values in 34 bytes") as caught:
        GGUFFile.open(path)
    assert caught.value.code == "header-dtype" and caught.value.tensor == "a"
    size = 8 * 2048 // 64 * 18
    right = [tensor("a", (2048, 8), 42, 0), tensor("b", (8,), 0, size)]
    GGUFFile.open(Raw(tensors=right, data=bytes(size + 32)).write(path))
    # A file that was cut off, or has a hole, is just that.
    assert code_of(Raw(tensors=right, data=bytes(size + 31)).write(path)) == "truncated"
    right[1] = tensor("b", (8,), 0, size + 32)
    assert code_of(Raw(tensors=right, data=bytes(size + 64)).write(path)) == "hole"


def test_strings_are_read_the_same_across_the_chunks_of_a_header(tmp_path, monkeypatch):
    words = [chr(97 + i % 26) * (i % 50) for i in range(400)]
    value = struct.pack("<IQ", STRING, len(words)) + b"".join(map(string, words))
    path = Raw(entries=[entry("w", ARRAY, value)]).write(tmp_path / "m.gguf")
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", 37)
    assert GGUFFile.open(path).metadata["w"] == words


def test_a_file_without_tensors_and_one_without_final_padding_are_read(tmp_path):
    assert GGUFFile.open(Raw(tensors=[], data=b"").write(tmp_path / "m.gguf")).tensors == {}
    assert len(GGUFFile.open(Raw(data=bytes(32 + 32)).write(tmp_path / "m.gguf")).tensors) == 2


FAULTS = {
    "header-magic": [Raw(magic=b"GGML"), Raw(magic=b"\0\0\0\0")],
    "header-version": [Raw(version=1), Raw(version=0x03000000), Raw(version=4)],
    "header-length": [Raw(tensor_count=2**60), Raw(entry_count=2**63), Raw(tensor_count=10**6)],
    "header-short": [
        Raw(entries=[struct.pack("<Q", 2**64 - 1) + bytes(20)]),
        Raw(entries=[entry("k", STRING, struct.pack("<Q", 2**63))]),
        Raw(entries=[entry("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]),
        Raw(entries=[entry("k", ARRAY, struct.pack("<IQ", U64, 2**60))]),
    ],
    "header-utf8": [
        Raw(entries=[entry(b"\xff\xfe", U32, bytes(4))]),
        Raw(tensors=[tensor(b"\xc3", (2,), 0, 0)]),
    ],
    "header-duplicate-key": [
        Raw(entries=[entry("k", U32, bytes(4))] * 2),
        Raw(tensors=[tensor("a", (2,), 0, 0), tensor("a", (2, 2), 1, 32)]),
    ],
    "header-metadata": [
        Raw(entries=[entry("k\x1b[2J", U32, bytes(4))]),
        Raw(entries=[entry("k" * 1001, U32, bytes(4))]),
        Raw(entries=[entry("k", 13, bytes(4))]),
        Raw(entries=[entry("k", 7, b"\x02")]),
        Raw(entries=[entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 0))]),
        Raw(entries=[entry("general.alignment", U32, struct.pack("<I", 0))]),
        Raw(entries=[entry("general.alignment", U32, struct.pack("<I", 48))]),
        Raw(entries=[entry("general.alignment", STRING, string("32"))]),
    ],
    "header-dtype": [Raw(tensors=[tensor("a", (2,), 4, 0)]), Raw(tensors=[tensor("a", (2,), 2**31, 0)])],
    "header-entry": [
        Raw(tensors=[tensor("a", (2, 1, 1, 1, 1), 0, 0)]),
        Raw(tensors=[tensor("a\n", (2,), 0, 0)]),
        Raw(tensors=[tensor("a", (31,), 2, 0)]),
        Raw(tensors=[tensor("a", (2,), 0, 8)]),
        Raw(tensors=[tensor("a", (0,), 0, 0)]),
        Raw(tensors=[tensor("", (2,), 0, 0)]),
    ],
    "size-overflow": [
        Raw(tensors=[tensor("a", (2**40, 2**40), 0, 0)]),
        Raw(tensors=[tensor("a", (2**63,), 0, 0)]),
    ],
    "overlap": [Raw(tensors=[tensor("a", (16,), 0, 0), tensor("b", (2, 2), 1, 32)])],
    "hole": [Raw(tensors=[tensor("a", (2,), 0, 0), tensor("b", (2, 2), 1, 64)], data=bytes(96))],
    "offsets-out-of-file": [Raw(tensors=[tensor("a", (2,), 0, 0), tensor("b", (2, 2), 1, 2**50)])],
    "truncated": [Raw(data=bytes(32 + 7)), Raw(data=b"")],
    "trailing-bytes": [Raw(data=bytes(32 + 33))],
}


@pytest.mark.parametrize(
    ("code", "raw"),
    [(code, raw) for code, raws in FAULTS.items() for raw in raws],
    ids=lambda x: getattr(x, "x", None),
)
def test_a_damaged_or_hostile_file_is_refused(code, raw, tmp_path):
    assert code_of(raw.write(tmp_path / "m.gguf")) == code


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = Raw().write(tmp_path / "whole.gguf").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert code_of(tmp_path / "cut.gguf") in ("header-short", "header-length", "truncated")


def test_a_fifo_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    assert code_of(tmp_path / "m.gguf") == "not-regular"


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    path = Raw().write(tmp_path / "m.gguf")
    info = GGUFFile.open(path).tensors["b"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError) as caught:
        info.read()
    assert caught.value.code == "truncated"
