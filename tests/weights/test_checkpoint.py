"""A checkpoint folder: what is read of it, and a named error for whatever is wrong with it or its file."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from pymllm.errors import CheckpointError
from pymllm.weights import checkpoint as checkpoint_module
from pymllm.weights import gguf_file, safetensors_file, tensor_file
from pymllm.weights.opening import open_checkpoint, resolve_model_path
from pymllm.weights.safetensors_file import SafetensorsFile

from . import hostile, hostile_folders
from .opening import error_of, random_tensor, same_bytes


def check(error: CheckpointError, fault: hostile.Fault, folder: Path) -> None:
    assert error.code == fault.code, str(error)
    assert error.file == str(folder / fault.file)
    if fault.tensor is not None:
        assert error.tensor == fault.tensor
    assert error.fix
    for mention in fault.mentions:
        assert mention in str(error)
    assert str(error).isprintable() and len(str(error)) < 2000


@pytest.mark.parametrize("fault", hostile.FILE_FAULTS, ids=lambda fault: fault.name)
def test_hostile_file_is_refused_by_name(fault, tmp_path):
    fault.build(tmp_path)
    check(error_of(SafetensorsFile.open, tmp_path / fault.file), fault, tmp_path)
    check(error_of(open_checkpoint, tmp_path), fault, tmp_path)


@pytest.mark.parametrize("fault", hostile_folders.FOLDER_FAULTS, ids=lambda fault: fault.name)
def test_hostile_folder_is_refused_by_name(fault, tmp_path):
    fault.build(tmp_path)
    check(error_of(open_checkpoint, tmp_path), fault, tmp_path)


@pytest.mark.parametrize("value", hostile_folders.ESCAPES)
def test_index_value_that_leads_out_of_the_folder_is_refused(value, tmp_path):
    hostile_folders.index_with_value(tmp_path, value)
    error = error_of(open_checkpoint, tmp_path)
    assert (error.code, error.tensor) == ("index-escapes", "t1")
    assert error.file == str(tmp_path / hostile_folders.INDEX)


def test_the_builders_without_their_fault_open(tmp_path):
    (tmp_path / "single").mkdir()
    hostile.write_good(tmp_path / "single")
    assert set(open_checkpoint(tmp_path / "single").tensors) == {"a", "b"}
    (tmp_path / "sharded").mkdir()
    hostile.write_sharded(tmp_path / "sharded")
    assert set(open_checkpoint(tmp_path / "sharded").tensors) == {"t0", "t1", "t2"}


def test_errors_list_expected_and_found_bytes_of_a_cut_off_file(tmp_path):
    hostile.write_good(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size - 5)
    error = error_of(open_checkpoint, tmp_path)
    assert (error.code, error.expected, error.found) == ("truncated", f"{size} bytes", f"{size - 5} bytes")


def test_validation_is_not_by_assert():
    for module in (tensor_file, safetensors_file, gguf_file, checkpoint_module):
        tree = ast.parse(inspect.getsource(module))
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]


# --- folders


def write_folder(folder: Path, files: dict[str, dict[str, torch.Tensor]], index: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index:
        hostile.write_index(folder, {tensor: name for name, tensors in files.items() for tensor in tensors})
    return folder


def test_checkpoint_reads_all_shards(tmp_path):
    files = {hostile.SHARDS[i]: {f"t{i}": random_tensor((3, i + 1), torch.float16, i)} for i in range(3)}
    with open_checkpoint(str(write_folder(tmp_path, files, index=True))) as checkpoint:
        assert checkpoint.path == tmp_path
        assert checkpoint.config == {"model_type": "llama", "hidden_size": 8}
        assert [file.path.name for file in checkpoint.files] == list(files)
        for name, tensors in files.items():
            for tensor, expected in tensors.items():
                assert checkpoint.tensors[tensor].file.path.name == name
                assert same_bytes(checkpoint.tensors[tensor].read(), expected)


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("files", "index", "chosen"),
    [
        (["model.safetensors"], False, ["model.safetensors"]),
        (["model.safetensors", "other.safetensors"], False, ["model.safetensors"]),
        (["b.safetensors", "a.safetensors"], False, ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "consolidated.safetensors"], False, ["a.safetensors"]),
        (["consolidated.safetensors"], False, ["consolidated.safetensors"]),
        (["x.safetensors", "y.safetensors"], True, ["x.safetensors", "y.safetensors"]),
    ],
)
def test_which_files_are_read(files, index, chosen, tmp_path):
    folder = write_folder(tmp_path, {name: {f"in {name}": ONE} for name in files}, index)
    (folder / "training_args.bin").write_bytes(b"")
    assert [file.path.name for file in open_checkpoint(folder).files] == chosen


def test_a_consistent_index_wins_over_the_single_file(tmp_path):
    folder = write_folder(tmp_path, {"x.safetensors": {"t": ONE}}, index=True)
    save_file({"t": ONE}, folder / "model.safetensors")
    assert [file.path.name for file in open_checkpoint(folder).files] == ["x.safetensors"]


def test_infinity_in_a_config_is_read(tmp_path):
    """transformers writes it, e.g. time_step_limit of Mamba2 models."""
    folder = write_folder(tmp_path, {"model.safetensors": {"t": ONE}})
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(folder).config == {"time_step_limit": [0.0, float("inf")]}


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        assert error_of(open_checkpoint, path).code == "folder-missing"


def test_disagreements_are_counted_and_cut_short_for_a_terminal(tmp_path):
    folder = write_folder(tmp_path, {"x.safetensors": {f"t{i}": torch.ones(1) for i in range(50)}})
    hostile.write_index(folder, {"t0": "x.safetensors"})
    error = error_of(open_checkpoint, folder)
    assert error.code == "index-disagrees"
    assert "and 41 more" in error.shortened() and "'t9'" not in error.shortened()
    assert "'t9'" in str(error)


# --- hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An offline hub with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_snapshot_of_links_into_blobs_opens(hub_cache, tmp_path):
    repository = hub_cache / "models--org--name"
    for part in ("blobs", "refs", "snapshots/0123"):
        (repository / part).mkdir(parents=True)
    (repository / "refs/main").write_text("0123")
    source = write_folder(tmp_path / "source", {"model.safetensors": {"t": ONE}})
    for number, file in enumerate(source.iterdir()):
        file.rename(repository / "blobs" / str(number))
        (repository / "snapshots/0123" / file.name).symlink_to(f"../../blobs/{number}")
    folder = resolve_model_path("org/name")
    assert folder == repository / "snapshots/0123"
    assert torch.equal(open_checkpoint(folder).tensors["t"].read(), ONE)


@pytest.mark.parametrize("model", ["org/absent", "nowhere", "./org/name", "a/b/c", "", "org/na me", "\0/x"])
def test_neither_a_folder_nor_on_the_hub(model, hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resolve_model_path(model)
    assert caught.value.code == "model-not-found"


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("org/name") == Path("org/name")
    assert resolve_model_path(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="revision 'main'"):
        resolve_model_path(tmp_path, revision="main")
