"""Builders of checkpoints that must be refused, one function a fault of the folder; the file itself: `hostile.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .hostile import (
    CONFIG,
    HUGE,
    SHARDS,
    Fault,
    write_good,
    write_index,
    write_raw,
    write_shard,
    write_sharded,
)

FOLDER_FAULTS: list[Fault] = []


def folder_fault(code: str, file: str, tensor: str | None = None, mentions: tuple[str, ...] = ()):
    def add(build: Callable[[Path], None]) -> Callable[[Path], None]:
        FOLDER_FAULTS.append(Fault(build, code, file, tensor, mentions))
        return build

    return add


INDEX = "model.safetensors.index.json"


@folder_fault("config-missing", "config.json")
def config_missing(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").unlink()


@folder_fault("config-json", "config.json")
def config_not_json(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").write_text("{")


@folder_fault("config-json", "config.json", mentions=("list",))
def config_not_an_object(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").write_text("[]")


@folder_fault("config-duplicate-key", "config.json", mentions=("'bits'",))
def config_with_a_nested_duplicate_key(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4, "bits": 8}}')


@folder_fault("config-utf8", "config.json")
def config_with_bad_utf8(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xc3"}')


@folder_fault("config-too-large", "config.json", mentions=(str((16 << 20) + 1),))
def config_too_large(folder: Path) -> None:
    write_good(folder)
    os.truncate(folder / "config.json", (16 << 20) + 1)


@folder_fault("not-regular", "config.json")
def config_is_a_fifo(folder: Path) -> None:
    write_good(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@folder_fault("weights-missing", "")
def no_weights(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)


@folder_fault("pickle-only", "pytorch_model.bin", mentions=("save_pretrained", "save_file"))
def only_pickles(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@folder_fault("shards-missing", INDEX, mentions=(SHARDS[0], SHARDS[2]))
def two_shards_missing(folder: Path) -> None:
    write_sharded(folder)
    (folder / SHARDS[0]).unlink()
    (folder / SHARDS[2]).unlink()


@folder_fault("shards-missing", INDEX, mentions=(SHARDS[1], "delete the index"))
def shard_missing_beside_a_single_file(folder: Path) -> None:
    write_sharded(folder)
    (folder / SHARDS[1]).unlink()
    write_shard(folder / "model.safetensors", ["t0", "t1", "t2"])


@folder_fault("shards-missing", INDEX, mentions=(SHARDS[1],))
def shard_is_a_dangling_link(folder: Path) -> None:
    write_sharded(folder)
    (folder / SHARDS[1]).unlink()
    (folder / SHARDS[1]).symlink_to("../../blobs/0123")


@folder_fault("header-length", SHARDS[1])
def damaged_shard(folder: Path) -> None:
    write_sharded(folder)
    write_raw(folder / SHARDS[1], b"{}", claimed=HUGE)


@folder_fault("index-disagrees", INDEX, tensor="t9", mentions=("t9", SHARDS[0], "lacks"))
def index_maps_a_tensor_that_no_shard_has(folder: Path) -> None:
    write_sharded(folder, {"t9": SHARDS[0]})


@folder_fault("index-disagrees", INDEX, tensor="t0", mentions=(SHARDS[0], SHARDS[1]))
def index_maps_a_tensor_to_the_wrong_shard(folder: Path) -> None:
    write_sharded(folder)
    write_shard(folder / SHARDS[1], ["t0", "t1"])
    write_shard(folder / SHARDS[0], ["t3"])
    write_index(folder, {"t0": SHARDS[0], "t3": SHARDS[0], "t1": SHARDS[1], "t2": SHARDS[2]})


@folder_fault("index-disagrees", INDEX, tensor="extra", mentions=("extra", SHARDS[2], "not mapped"))
def shard_has_a_tensor_that_the_index_lacks(folder: Path) -> None:
    write_sharded(folder)
    write_shard(folder / SHARDS[2], ["t2", "extra"])


@folder_fault("duplicate-tensor", SHARDS[2], tensor="t0", mentions=(SHARDS[0], SHARDS[2]))
def tensor_in_two_shards(folder: Path) -> None:
    write_sharded(folder)
    write_shard(folder / SHARDS[2], ["t2", "t0"])


@folder_fault("duplicate-tensor", "b.safetensors", tensor="t", mentions=("a.safetensors", "b.safetensors"))
def tensor_in_two_files_without_an_index(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    write_shard(folder / "a.safetensors", ["t"])
    write_shard(folder / "b.safetensors", ["t"])


@folder_fault("index-json", INDEX)
def index_not_json(folder: Path) -> None:
    write_sharded(folder)
    (folder / INDEX).write_text("weights")


@folder_fault("index-duplicate-key", INDEX, tensor="t0")
def index_maps_a_tensor_twice(folder: Path) -> None:
    write_sharded(folder)
    text = f'{{"weight_map": {{"t0": "{SHARDS[0]}", "t1": "{SHARDS[1]}", "t0": "{SHARDS[2]}"}}}}'
    (folder / INDEX).write_text(text)


@folder_fault("index-entry", INDEX)
def index_without_weight_map(folder: Path) -> None:
    write_sharded(folder)
    (folder / INDEX).write_text('{"metadata": {}}')


@folder_fault("index-entry", INDEX)
def index_with_a_list_for_weight_map(folder: Path) -> None:
    write_sharded(folder)
    write_index(folder, ["t0", "t1", "t2"])


@folder_fault("index-entry", INDEX, tensor="t1")
def index_maps_a_tensor_to_a_number(folder: Path) -> None:
    write_sharded(folder, {"t1": 1})


@folder_fault("index-entry", INDEX, tensor="t1")
def index_maps_a_tensor_to_a_pickle(folder: Path) -> None:
    write_sharded(folder, {"t1": "pytorch_model.bin"})


@folder_fault("index-entry", INDEX, mentions=("\\x07",))
def index_with_an_unprintable_tensor_name(folder: Path) -> None:
    write_sharded(folder, {"\x07": SHARDS[0]})


# Values of an index that lead, or could lead, out of the folder: error "index-escapes".
ESCAPES = (
    "../model.safetensors",
    "..",
    ".",
    "",
    "/etc/model.safetensors",
    "sub/model.safetensors",
    "..\\model.safetensors",
    "C:model.safetensors",
    "model\0.safetensors",
    "model\n.safetensors",
)


def index_with_value(folder: Path, value: str) -> None:
    """A sharded checkpoint whose index maps t1 to `value`."""
    write_sharded(folder, {"t1": value})
