"""Builders of checkpoints that must be refused, one function a fault: of model.safetensors, `FILE_FAULTS`.

Each builder takes an empty folder and leaves a checkpoint with exactly one fault there; without it the folder
would load.  `hostile_folders.py` has the faults of the folder around that file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONFIG = '{"model_type": "llama"}'
SHARDS = (
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
)
HUGE = 1 << 40
# Tensor "a" of 8 bytes, then "b" of 16.
GOOD: dict[str, object] = {
    "a": {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
}


@dataclass(frozen=True)
class Fault:
    """build(folder) makes the checkpoint; opening it gives an error with this code, file name and tensor.

    mentions: words that the message must have.
    """

    build: Callable[[Path], None]
    code: str
    file: str
    tensor: str | None
    mentions: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.build.__name__


FILE_FAULTS: list[Fault] = []


def file_fault(code: str, tensor: str | None = None, mentions: tuple[str, ...] = ()):
    def add(build: Callable[[Path], None]) -> Callable[[Path], None]:
        FILE_FAULTS.append(Fault(build, code, "model.safetensors", tensor, mentions))
        return build

    return add


def write_raw(path: Path, header: bytes, data: bytes = b"", claimed: int | None = None) -> None:
    """A file with this header text, whatever it says; `claimed` replaces its length."""
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + data)


def write_header(folder: Path, header: object, data: bytes = bytes(24)) -> None:
    write_text(folder, json.dumps(header), data)


def write_text(folder: Path, header: str, data: bytes = bytes(24)) -> None:
    (folder / "config.json").write_text(CONFIG)
    write_raw(folder / "model.safetensors", header.encode(), data)


def write_good(folder: Path) -> None:
    write_header(folder, GOOD)


def write_sharded(folder: Path, weight_map: dict[str, object] | None = None) -> None:
    """Tensors t0, t1, t2 of 4 bytes in three shards, and an index; `weight_map` changes entries of the index."""
    (folder / "config.json").write_text(CONFIG)
    for number, shard in enumerate(SHARDS):
        write_shard(folder / shard, [f"t{number}"])
    write_index(folder, {f"t{number}": shard for number, shard in enumerate(SHARDS)} | (weight_map or {}))


def write_shard(path: Path, names: list[str]) -> None:
    header = {}
    for number, name in enumerate(names):
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [4 * number, 4 * number + 4]}
    write_raw(path, json.dumps(header).encode(), bytes(4 * len(names)))


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def changed(name: str, **fields: object) -> dict[str, object]:
    """GOOD with fields of one tensor replaced."""
    entry = GOOD[name]
    return GOOD | {name: {**(entry if isinstance(entry, dict) else {}), **fields}}


# --- the header's length and text


@file_fault("header-short", mentions=("7 bytes",))
def shorter_than_a_header(folder: Path) -> None:
    write_good(folder)
    (folder / "model.safetensors").write_bytes(bytes(7))


@file_fault("header-short", mentions=("0 bytes",))
def empty_file(folder: Path) -> None:
    write_good(folder)
    (folder / "model.safetensors").write_bytes(b"")


@file_fault("header-length", mentions=("0 bytes",))
def header_length_zero(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", b"{}", claimed=0)


@file_fault("header-length", mentions=(str(HUGE),))
def header_length_beyond_the_file(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", b"{}", claimed=HUGE)


@file_fault("header-length", mentions=(str((1 << 64) - 1),))
def header_length_of_all_ones(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", b"{}", claimed=(1 << 64) - 1)


@file_fault("header-length", mentions=("100000000", "100000001"))
def header_length_bomb_in_a_sparse_file(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", b"{}", claimed=100_000_001)
    os.truncate(folder / "model.safetensors", 200_000_000)


@file_fault("header-utf8")
def header_with_bad_utf8(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", b'{"\xff": 1}')


@file_fault("header-json")
def header_in_utf16(folder: Path) -> None:
    write_good(folder)
    write_raw(folder / "model.safetensors", "{}".encode("utf-16-le"))


@file_fault("header-json")
def header_not_json(folder: Path) -> None:
    write_text(folder, '{"a": ')


@file_fault("header-json")
def header_with_text_after_the_object(folder: Path) -> None:
    write_text(folder, json.dumps(GOOD) + "{}")


@file_fault("header-json", mentions=("list",))
def header_is_a_list(folder: Path) -> None:
    write_header(folder, [GOOD])


@file_fault("header-json", mentions=("nested",))
def header_nested_a_million_deep(folder: Path) -> None:
    write_text(folder, '{"a": ' + "[" * 1_000_000)


@file_fault("header-json")
def header_with_a_number_of_a_million_digits(folder: Path) -> None:
    write_text(folder, '{"a": ' + "9" * 1_000_000 + "}")


@file_fault("header-json", mentions=("NaN",))
def header_with_nan(folder: Path) -> None:
    write_text(folder, '{"a": {"dtype": "F16", "shape": [NaN], "data_offsets": [0, 8]}}')


@file_fault("header-json", mentions=("Infinity",))
def header_with_infinity(folder: Path) -> None:
    write_text(folder, '{"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, Infinity]}}')


@file_fault("header-duplicate-key", tensor="a")
def tensor_described_twice(folder: Path) -> None:
    entry = '"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'
    write_text(folder, f"{{{entry}, {entry}}}")


@file_fault("header-duplicate-key", mentions=("'shape'",))
def shape_given_twice(folder: Path) -> None:
    write_text(folder, '{"a": {"dtype": "F32", "shape": [6], "shape": [3, 2], "data_offsets": [0, 24]}}')


# --- entries


@file_fault("header-metadata")
def metadata_not_an_object(folder: Path) -> None:
    write_header(folder, GOOD | {"__metadata__": ["format", "pt"]})


@file_fault("header-metadata")
def metadata_with_a_number(folder: Path) -> None:
    write_header(folder, GOOD | {"__metadata__": {"format": 1}})


@file_fault("header-entry", tensor="a")
def entry_not_an_object(folder: Path) -> None:
    write_header(folder, GOOD | {"a": [0, 8]})


@file_fault("header-entry", tensor="a")
def entry_without_dtype(folder: Path) -> None:
    write_header(folder, GOOD | {"a": {"shape": [4], "data_offsets": [0, 8]}})


@file_fault("header-entry", tensor="a")
def entry_without_shape(folder: Path) -> None:
    write_header(folder, GOOD | {"a": {"dtype": "F16", "data_offsets": [0, 8]}})


@file_fault("header-entry", tensor="a")
def entry_without_offsets(folder: Path) -> None:
    write_header(folder, GOOD | {"a": {"dtype": "F16", "shape": [4]}})


@file_fault("header-entry", tensor="a")
def entry_with_another_field(folder: Path) -> None:
    write_header(folder, changed("a", scale=2))


@file_fault("header-entry", tensor="a")
def dtype_not_a_string(folder: Path) -> None:
    write_header(folder, changed("a", dtype=["F16"]))


@file_fault("header-dtype", tensor="a", mentions=("F17", "BF16"))
def dtype_unknown(folder: Path) -> None:
    write_header(folder, changed("a", dtype="F17"))


@file_fault("header-entry", tensor="a")
def shape_not_a_list(folder: Path) -> None:
    write_header(folder, changed("a", shape=4))


@file_fault("header-entry", tensor="b")
def shape_with_a_bool(folder: Path) -> None:
    write_header(folder, changed("b", shape=[4, True]))


@file_fault("header-entry", tensor="a")
def shape_with_a_float(folder: Path) -> None:
    write_header(folder, changed("a", shape=[2.0, 2]))


@file_fault("header-entry", tensor="a")
def shape_with_a_negative(folder: Path) -> None:
    write_header(folder, changed("a", shape=[-2, -2]))


@file_fault("header-entry", tensor="a")
def shape_of_rank_100(folder: Path) -> None:
    write_header(folder, changed("a", shape=[4] + [1] * 99))


@file_fault("header-entry", tensor="a")
def offsets_with_a_bool(folder: Path) -> None:
    write_header(folder, changed("a", data_offsets=[False, 8]))


@file_fault("header-entry", tensor="a")
def offsets_with_a_float(folder: Path) -> None:
    write_header(folder, changed("a", data_offsets=[0, 8.0]))


@file_fault("header-entry", tensor="a")
def offsets_negative(folder: Path) -> None:
    write_header(folder, changed("a", data_offsets=[-8, 0]))


@file_fault("header-entry", tensor="a")
def offsets_reversed(folder: Path) -> None:
    write_header(folder, changed("a", data_offsets=[8, 0]))


@file_fault("header-entry", tensor="a")
def offsets_of_three(folder: Path) -> None:
    write_header(folder, changed("a", data_offsets=[0, 8, 8]))


@file_fault("header-entry", mentions=("\\x1b",))
def name_with_a_terminal_escape(folder: Path) -> None:
    write_header(folder, {"\x1b[2Jb": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}})


@file_fault("header-entry", mentions=("\\ud800",))
def name_with_a_lone_surrogate(folder: Path) -> None:
    write_header(folder, {"\ud800": {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}})


@file_fault("header-entry", mentions=("100000",))
def name_of_100_000_characters(folder: Path) -> None:
    write_header(folder, {"x" * 100_000: {"dtype": "U8", "shape": [24], "data_offsets": [0, 24]}})


# --- sizes and places


@file_fault("size-mismatch", tensor="a", mentions=("10 bytes", "8 bytes"))
def shape_larger_than_its_bytes(folder: Path) -> None:
    write_header(folder, changed("a", shape=[5]))


@file_fault("size-mismatch", tensor="a", mentions=("6 bytes", "8 bytes"))
def shape_smaller_than_its_bytes(folder: Path) -> None:
    write_header(folder, changed("a", shape=[3]))


@file_fault("size-mismatch", tensor="a")
def sub_byte_elements_that_end_inside_a_byte(folder: Path) -> None:
    write_header(folder, changed("a", dtype="F4", shape=[15]))


@file_fault("size-mismatch", tensor="a", mentions=(str(HUGE * 2),))
def shape_of_a_tebi(folder: Path) -> None:
    write_header(folder, changed("a", shape=[HUGE]))


@file_fault("size-overflow", tensor="a")
def shape_that_wraps_around_to_its_bytes(folder: Path) -> None:
    write_header(folder, changed("a", shape=[(1 << 62) + 1, 4]))  # 2 * 4 * (2^62 + 1) = 8 modulo 2^64


@file_fault("size-overflow", tensor="a")
def shape_of_zero_elements_that_overflows_strides(folder: Path) -> None:
    write_header(folder, changed("a", shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]))


@file_fault("header-entry", tensor="a")
def shape_beyond_64_bits(folder: Path) -> None:
    write_header(folder, changed("a", shape=[1 << 64]))


@file_fault("truncated", tensor="b")
def file_cut_off(folder: Path) -> None:
    write_header(folder, GOOD, bytes(23))


@file_fault("truncated", tensor="a")
def file_cut_off_in_the_first_tensor(folder: Path) -> None:
    write_header(folder, GOOD, bytes(3))


@file_fault("truncated", tensor="a", mentions=(str(HUGE),))
def consistent_claim_of_a_tebi(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [HUGE - 200], "data_offsets": [0, HUGE - 200]}})
    write_text(folder, header.ljust(192), bytes(24))


@file_fault("offsets-out-of-file", tensor="b")
def offsets_beyond_the_file(folder: Path) -> None:
    write_header(folder, changed("b", data_offsets=[HUGE, HUGE + 16]))


@file_fault("overlap", tensor="b", mentions=("'a'", "'b'"))
def tensors_overlap(folder: Path) -> None:
    write_header(folder, changed("b", data_offsets=[4, 20]), bytes(20))


@file_fault("overlap", mentions=("'a'", "'c'"))
def tensors_share_all_bytes(folder: Path) -> None:
    write_header(folder, GOOD | {"c": GOOD["a"]})


@file_fault("overlap", tensor="c", mentions=("'b'", "'c'"))
def empty_tensor_inside_another(folder: Path) -> None:
    write_header(folder, GOOD | {"c": {"dtype": "F32", "shape": [0], "data_offsets": [12, 12]}})


@file_fault("hole", tensor="b")
def hole_between_tensors(folder: Path) -> None:
    write_header(folder, changed("b", data_offsets=[12, 28]), bytes(28))


@file_fault("hole", tensor="a")
def hole_before_the_first_tensor(folder: Path) -> None:
    write_header(folder, {"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, bytes(8))


@file_fault("trailing-bytes")
def bytes_after_the_last_tensor(folder: Path) -> None:
    write_header(folder, GOOD, bytes(25))


@file_fault("trailing-bytes")
def bytes_without_any_tensor(folder: Path) -> None:
    write_header(folder, {}, bytes(1))


# --- what the path leads to


@file_fault("not-regular")
def fifo_for_a_file(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    os.mkfifo(folder / "model.safetensors")


@file_fault("not-regular")
def link_to_a_device(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").symlink_to("/dev/zero")


@file_fault("not-regular")
def folder_for_a_file(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").mkdir()


@file_fault("symlink-loop")
def symlink_loop(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").symlink_to("other.safetensors")
    (folder / "other.safetensors").symlink_to("model.safetensors")


@file_fault("not-found")
def dangling_link(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
