"""One safetensors file: equal to the safetensors library on what is good, safe while the file changes."""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymllm.errors import CheckpointError
from pymllm.weights import safetensors_file, tensor_file
from pymllm.weights.safetensors_file import SafetensorsFile

from ..processes import python
from . import hostile
from .opening import random_tensor, same_bytes, write

DTYPES = {name: dtype for name, (_, dtype) in safetensors_file.DTYPES.items() if dtype is not None}


@pytest.fixture
def bytes_read(monkeypatch):
    """A list that collects the byte count of every read."""
    counts: list[int] = []
    real = os.preadv

    def counting(fd, buffers, offset):
        counts.append(real(fd, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    return counts


def numbers_of_open_files(path: Path) -> int:
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return sum(link.is_symlink() and os.readlink(link) == str(path) for link in links)


# --- good files


def test_header_is_the_same_as_the_writers(tmp_path):
    tensors = {
        "w": random_tensor((3, 5), torch.bfloat16),
        "empty": torch.empty(0, 7),
        "one": torch.tensor(2.5),
    }
    file = write(tmp_path / "x.safetensors", tensors)
    assert file.metadata == {"format": "pt"}
    assert {name: (info.shape, info.dtype, info.nbytes) for name, info in file.tensors.items()} == {
        "w": ((3, 5), torch.bfloat16, 30),
        "empty": ((0, 7), torch.float32, 0),
        "one": ((), torch.float32, 4),
    }
    assert sorted(file.tensors.values(), key=lambda info: info.start) == list(file.tensors.values())


def test_file_without_tensors_opens(tmp_path):
    hostile.write_raw(tmp_path / "x.safetensors", b"{}   ")
    assert SafetensorsFile.open(tmp_path / "x.safetensors").tensors == {}


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_as_written(name, tmp_path):
    """The library's Python side lacks some dtypes, so the header is written by hand; the bytes are known."""
    expected = random_tensor((6, 10), DTYPES[name])
    raw = expected.view(torch.uint8).numpy().tobytes()
    header = {"t": {"dtype": name, "shape": [6, 10], "data_offsets": [0, len(raw)]}}
    hostile.write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), raw)
    info = SafetensorsFile.open(tmp_path / "x.safetensors").tensors["t"]
    assert same_bytes(info.read(), expected)
    transposed = torch.empty((10, 6), dtype=DTYPES[name]).t()
    assert info.read(out=transposed) is transposed
    assert same_bytes(transposed, expected)
    assert same_bytes(info.read((slice(1, 5), slice(3, 7))), expected[1:5, 3:7])


@pytest.mark.parametrize("seed", range(8))
def test_random_slices_are_equal_to_the_librarys_tensors(seed, tmp_path, monkeypatch):
    """Small limits send the same small tensors through every path: one run, segments, blocks, staging."""
    rng = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr(tensor_file, "WIDE_BYTES", 16)
        monkeypatch.setattr(tensor_file, "LONG_ROW_BYTES", 64)
        monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 128)
        monkeypatch.setattr(tensor_file, "STAGE_BYTES", 64)
        monkeypatch.setattr(tensor_file, "MAX_READ_BYTES", 7)
    shapes = [
        tuple(rng.choice([0, 1, 1, 2, 3, 5, 8, 17]) for _ in range(rng.randrange(5))) for _ in range(25)
    ]
    dtypes = [
        rng.choice([torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool]) for _ in shapes
    ]
    written = {
        f"t{i}": random_tensor(shape, dtype, i)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    }
    file = write(tmp_path / "x.safetensors", written)
    for name, expected in load_file(tmp_path / "x.safetensors").items():
        info = file.tensors[name]
        assert same_bytes(info.read(), expected)
        for _ in range(12):
            edges = [sorted((rng.randint(0, size), rng.randint(0, size))) for size in expected.shape]
            index = tuple(slice(*edge) for edge in edges)[: rng.randint(0, len(edges))]
            cut = expected[index]
            assert same_bytes(info.read(index), cut), (expected.shape, index)
            for out in destinations(cut, rng):
                assert info.read(index, out=out) is out
                assert same_bytes(out, cut), (expected.shape, index, out.stride())


def destinations(like, rng):
    """Tensors of the shape of `like`: contiguous, inside a larger tensor, with the dims in another order."""
    yield torch.empty_like(like)
    padded = torch.zeros([size + rng.randint(0, 2) for size in like.shape], dtype=like.dtype)
    yield padded[tuple(slice(0, size) for size in like.shape)]
    order = rng.sample(range(like.ndim), like.ndim)
    back = sorted(range(like.ndim), key=order.__getitem__)
    yield torch.empty([like.shape[dim] for dim in order], dtype=like.dtype).permute(back)


def test_read_into_a_view_leaves_its_surroundings(tmp_path):
    expected = random_tensor((6, 4), torch.float32)
    info = write(tmp_path / "x.safetensors", {"t": expected}).tensors["t"]
    fused = torch.nn.Parameter(torch.full((6, 12), 7.0))
    info.read(out=fused[:, 4:8])
    assert same_bytes(fused[:, 4:8].detach(), expected)
    assert (fused[:, :4] == 7).all() and (fused[:, 8:] == 7).all()


@pytest.mark.parametrize(
    ("shape", "index", "reads"),
    [
        ((64, 4096), (slice(8, 24),), 1),  # rows: one run
        ((64, 4096), (slice(None), slice(1024, 3072)), 64),  # 4 KiB segments
        ((4, 16, 4096), (slice(1, 3), slice(4, 8)), 2),  # rows of each expert
        ((64, 20000), (slice(None), slice(16, 17)), 64),  # narrow, in rows too long to copy
    ],
)
def test_wide_slices_read_exactly_their_bytes(shape, index, reads, tmp_path, bytes_read):
    expected = random_tensor(shape, torch.int16)
    info = write(tmp_path / "x.safetensors", {"before": torch.ones(3), "t": expected}).tensors["t"]
    bytes_read.clear()
    assert same_bytes(info.read(index), expected[index])
    assert sum(bytes_read) == expected[index].numel() * 2
    assert len(bytes_read) == reads


def test_narrow_slices_read_blocks_of_rows_within_the_scratch(tmp_path, bytes_read):
    expected = random_tensor((5000, 1024), torch.int16)  # 2 KiB a row, 9.8 MiB
    info = write(tmp_path / "x.safetensors", {"t": expected}).tensors["t"]
    bytes_read.clear()
    tracemalloc.start()
    actual = info.read((slice(100, 4900), slice(512, 576)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same_bytes(actual, expected[100:4900, 512:576])
    assert sum(bytes_read) == 4800 * 2048
    assert max(bytes_read) <= tensor_file.BLOCK_BYTES
    assert peak < tensor_file.BLOCK_BYTES + (1 << 20)


def test_opening_reads_no_tensor_byte_and_keeps_no_file_open(tmp_path, bytes_read):
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.ones(1000)}, path)
    file = SafetensorsFile.open(path)
    assert sum(bytes_read) == file.tensors["t"].start
    assert numbers_of_open_files(path) == 0


@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 5),),  # beyond the end: python would clamp it
        (slice(-1, None),),
        (slice(3, 1),),
        (slice(0, 4, 2),),
        (slice(None), slice(None), slice(None)),
        (1,),
    ],
)
def test_an_index_that_does_not_fit_is_refused(index, tmp_path):
    info = write(tmp_path / "x.safetensors", {"name": torch.ones(4, 4)}).tensors["name"]
    with pytest.raises(ValueError, match=r"^name: "):
        info.read(index)


@pytest.mark.parametrize(
    "out",
    [torch.empty(4, 3), torch.empty(4, 4, dtype=torch.float16), torch.empty(4, 4, device="meta")],
    ids=["shape", "dtype", "meta"],
)
def test_an_out_that_does_not_fit_is_refused(out, tmp_path):
    info = write(tmp_path / "x.safetensors", {"name": torch.ones(4, 4)}).tensors["name"]
    with pytest.raises(ValueError, match=r"^name: cannot read"):
        info.read(out=out)


def test_sub_byte_tensor_is_listed_and_refused_when_used(tmp_path):
    header = {"codes": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}
    hostile.write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(6))
    info = SafetensorsFile.open(tmp_path / "x.safetensors").tensors["codes"]
    assert (info.dtype_name, info.shape, info.nbytes) == ("F4", (3, 4), 6)
    for use in (lambda: info.dtype, info.read):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert (caught.value.code, caught.value.tensor, caught.value.found) == (
            "dtype-unsupported",
            "codes",
            "F4",
        )


def test_unreadable_file_is_an_error(tmp_path, monkeypatch):
    """EIO, as from a bad disk or a stale network mount."""
    info = write(tmp_path / "x.safetensors", {"t": torch.ones(4)}).tensors["t"]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        info.read()
    assert (caught.value.code, caught.value.tensor) == ("unreadable", "t")


# --- files that change


@pytest.mark.parametrize("already_open", [False, True])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_changed_size_is_an_error_not_a_crash(already_open, change, tmp_path):
    path = tmp_path / "x.safetensors"
    file = write(path, {"a": torch.ones(4), "b": torch.ones(1000)})
    if already_open:
        file.tensors["a"].read()
    size = path.stat().st_size
    os.truncate(path, size + change)
    for name in ("a", "b"):
        with pytest.raises(CheckpointError) as caught:
            file.tensors[name].read()
        error = caught.value
        assert (error.code, error.file, error.tensor) == ("truncated", str(path), name)
        assert (error.expected, error.found) == (f"{size} bytes", f"{size + change} bytes")


def test_a_file_truncated_during_a_read_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    info = write(path, {"t": torch.ones(1000)}).tensors["t"]
    real = os.preadv

    def truncating(fd, buffers, offset):
        count = real(fd, buffers, offset)
        os.truncate(path, info.start + 2000)
        return count

    monkeypatch.setattr(tensor_file, "MAX_READ_BYTES", 1000)
    monkeypatch.setattr(os, "preadv", truncating)
    with pytest.raises(CheckpointError) as caught:
        info.read()
    assert (caught.value.code, caught.value.tensor) == ("truncated", "t")
    assert caught.value.found == f"{info.start + 2000} bytes"


def test_a_file_replaced_before_its_first_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    info = write(path, {"t": torch.ones(4)}).tensors["t"]
    save_file({"t": torch.zeros(4)}, tmp_path / "new", metadata={"format": "pt"})
    os.replace(tmp_path / "new", path)
    with pytest.raises(CheckpointError) as caught:
        info.read()
    assert caught.value.code == "changed"


def test_a_file_removed_before_its_first_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    info = write(path, {"t": torch.ones(4)}).tensors["t"]
    path.unlink()
    with pytest.raises(CheckpointError) as caught:
        info.read()
    assert (caught.value.code, caught.value.file) == ("not-found", str(path))


def test_a_fifo_that_replaces_the_file_does_not_block(tmp_path):
    """In a process with a deadline: a reader that blocks in open() cannot be interrupted from a test."""
    hostile.write_good(tmp_path)
    script = """
import os, sys
from pymllm.weights import safetensors_file as module
path = sys.argv[1]
real = os.stat
def stat_then_swap(name):
    found = real(name)
    os.unlink(path)
    os.mkfifo(path)
    return found
os.stat = stat_then_swap
try:
    module.SafetensorsFile.open(path)
except module.CheckpointError as error:
    print(error.code)
"""
    done = python("-O", "-c", script, tmp_path / "model.safetensors")
    assert done.stdout == "not-regular\n", done.stderr


# --- open files


def test_close_and_collection_release_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    file = write(path, {"t": torch.ones(4)})
    with file:
        file.tensors["t"].read()
        file.tensors["t"].read()
        assert numbers_of_open_files(path) == 1
    assert numbers_of_open_files(path) == 0
    assert torch.equal(file.tensors["t"].read(), torch.ones(4))  # opens it once more
    assert numbers_of_open_files(path) == 1
    del file
    gc.collect()
    assert numbers_of_open_files(path) == 0


def test_threads_read_while_another_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_READ_BYTES", 4096)
    expected = random_tensor((64, 4096), torch.uint8)
    path = tmp_path / "x.safetensors"
    file = write(path, {"t": expected})
    wrong: list[object] = []
    stop = threading.Event()

    def read(row):
        while not stop.is_set():
            try:
                rows = slice(row, row + 16)
                if not torch.equal(file.tensors["t"].read((rows,)), expected[rows]):
                    wrong.append(row)
            except CheckpointError as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(row,)) for row in (0, 16, 32, 48)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        file.close()
    stop.set()
    for thread in threads:
        thread.join()
    file.close()
    assert wrong == []
    assert numbers_of_open_files(path) == 0
