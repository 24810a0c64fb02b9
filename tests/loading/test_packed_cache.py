"""Packed weights that are kept: the next start takes them bit by bit, and never those of anything else."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from pymllm import load_model
from pymllm.cli import main
from pymllm.kernels.native.extension import native, native_available
from pymllm.loading import packed_file, packed_key
from pymllm.parallel import Parallel

from ..checkpoints import AWQ, FP8, CompressedFP8, Plain, write_checkpoint

pytestmark = pytest.mark.skipif(
    not native_available(), reason="packed weights are kept with the native kernels alone"
)


def load(folder, cache, **options):
    return load_model(folder, packed_cache=cache, progress=False, check_memory=False, **options)


def taken(model):
    return bool(model.load_report.taken_from)


def state(model):
    """Every tensor of the modules and of their packed weights, by a walk of this test's own."""
    found = {}
    for name, module in model.named_modules():
        for key, value in {**vars(module), **module._parameters, **module._buffers}.items():
            for part, tensor in (getattr(value, "packed", None) or {"": value}).items():
                if isinstance(tensor, torch.Tensor):
                    found[name, key, part] = tensor
            if getattr(value, "input_order", None) is not None:
                found[name, key, "order"] = value.input_order
    return found


def assert_same(one, other):
    mine, theirs = state(one), state(other)
    assert mine.keys() == theirs.keys() and mine
    for place, tensor in mine.items():
        there = theirs[place]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (there.dtype, there.shape, there.stride()), (
            place
        )
        assert tensor.device.type == there.device.type == "cpu"
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), there.reshape(-1).view(torch.uint8)), place


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("good"), "llama", AWQ(64), num_hidden_layers=1).folder


@pytest.fixture
def kept(good, tmp_path):
    """A copy of the checkpoint, and the folder where its packed weights are kept."""
    folder = shutil.copytree(good, tmp_path / "model")
    load(folder, tmp_path / "kept")
    return folder, tmp_path / "kept"


CASES = {
    "awq": ("llama", AWQ(64), {}),
    "fp8": ("llama", FP8(), {}),
    "fp8-static": ("llama", FP8(None, static=True), {}),
    "compressed": ("llama", CompressedFP8("channel"), {}),
    "bfloat16": ("llama", Plain(torch.bfloat16), {}),
    "split": ("llama", Plain(torch.bfloat16), {"quant": ["**.k_proj=int8", "**.down_proj=int4"]}),
    "kv": ("llama", AWQ(64), {"kv_cache": "fp8"}),
    "tied": ("llama", Plain(torch.bfloat16), {"quant": ["**=int8"]}),
    "hybrid": ("qwen3_5_text", Plain(torch.bfloat16), {}),
    "generic": ("llama", AWQ(64), {"definition": "transformers"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_taken_is_what_was_loaded(case, tmp_path):
    family, writer, options = CASES[case]
    settings = {"tie_word_embeddings": True} if case == "tied" else {}
    settings |= {} if family == "qwen3_5_text" else {"num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path / "model", family, writer, **settings).folder
    first, second = (load(folder, tmp_path / "kept", **options) for _ in range(2))
    assert not taken(first) and taken(second)
    assert_same(first, second)
    one, other = first.load_report, second.load_report
    assert (one.tensors, one.methods, one.final_bytes, one.bytes_read) == (
        other.tensors,
        other.methods,
        other.final_bytes,
        other.bytes_read,
    )


def test_each_damaged_byte_is_found(kept, caplog):
    folder, cache = kept
    (file,) = cache.glob("*.packed")
    whole = file.read_bytes()
    key = packed_file.read_header(file)[0]["key"]
    file.chmod(0o600)
    for at in (0, 9, 20, len(whole) // 3, len(whole) // 2, len(whole) - 1, 4000):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(packed_file.UnfitError):
            packed_file.map_packed(file, key, 1)
    for cut in (0, 7, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(packed_file.UnfitError):
            packed_file.map_packed(file, key, 1)
    assert not taken(load(folder, cache)) and "made anew" in caplog.text
    assert taken(load(folder, cache))


def stale_settings(folder, monkeypatch):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("1e-05", "2e-05"))


def stale_weights(folder, monkeypatch):
    """Edit a file in place, and put its time back."""
    file = next(folder.glob("*.safetensors"))
    before = file.stat()
    with open(file, "r+b") as out:
        out.seek(before.st_size // 2)
        byte = out.read(1)
        out.seek(before.st_size // 2)
        out.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def stale_code(folder, monkeypatch):
    monkeypatch.setattr(packed_key, "_code", lambda: ("another build",))


def stale_machine(folder, monkeypatch):
    monkeypatch.setattr(packed_key, "_machine", lambda: iter(["another CPU"]))


@pytest.mark.parametrize("change", [stale_settings, stale_weights, stale_code, stale_machine])
def test_what_is_stale_is_made_anew(kept, monkeypatch, change):
    folder, cache = kept
    change(folder, monkeypatch)
    assert not taken(load(folder, cache))
    assert taken(load(folder, cache))
    assert len(list(cache.iterdir())) <= 2


def test_other_decisions_have_files_of_their_own(kept):
    folder, cache = kept
    for options in (
        {"quant": ["**.down_proj=int8"]},
        {"dtype": "bfloat16"},
        {"kernels": {"linear": "reference"}},
    ):
        assert not taken(load(folder, cache, **options))
    with Parallel(rank=0, size=1, expert_parallel=True):
        assert not taken(load(folder, cache))
    assert taken(load(folder, cache))


def test_nothing_is_written_into_the_file(kept):
    folder, cache = kept
    (file,) = cache.glob("*.packed")
    whole = file.read_bytes()
    model = load(folder, cache)
    for tensor in state(model).values():
        tensor.data.view(-1).fill_(0)
    assert file.read_bytes() == whole


def test_the_folder_is_the_users_alone(kept, caplog):
    folder, cache = kept
    assert cache.stat().st_mode & 0o077 == 0
    cache.chmod(0o777)
    assert not taken(load(folder, cache)) and "other users may write" in caplog.text


def test_where_nothing_can_be_written_it_is_a_warning(good, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert not taken(load(good, tmp_path / "file" / "kept"))
    assert "not kept" in caplog.text


def test_pack_keeps_ahead_what_a_start_takes(good, tmp_path, capsys):
    kept = tmp_path / "kept"
    verb = ["pack", str(good), "--packed-cache"]
    assert main([*verb, str(kept)]) == 0
    (file,) = kept.glob("*.packed")
    assert capsys.readouterr().out.strip() == str(file)
    assert taken(load(good, kept))
    assert main([*verb, str(kept)]) == 0 and "kept before" in capsys.readouterr().out
    assert main([*verb, "off"]) == 1
    (tmp_path / "file").write_text("")
    assert main([*verb, str(tmp_path / "file" / "kept")]) == 1
    assert (
        main(
            [
                "run",
                str(good),
                "--prompt-ids",
                "1,2",
                "--max-tokens",
                "1",
                "--stats",
                "--packed-cache",
                str(kept),
            ]
        )
        == 0
    )
    assert f"taken from {file}" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 7, 8, 63, 64, 65, 200])
def test_sums_are_those_of_their_formula(count):
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    found = native().lane_sums(data.data_ptr(), count)
    raw = bytes(data.tolist())
    raw += bytes(-len(raw) % 64)
    words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
    rows = len(words) // 8
    plain = [sum(words[lane::8]) for lane in range(8)]
    weighted = [sum((rows - i) * word for i, word in enumerate(words[lane::8])) for lane in range(8)]
    assert found == b"".join((value % 2**64).to_bytes(8, "little") for value in plain + weighted)
