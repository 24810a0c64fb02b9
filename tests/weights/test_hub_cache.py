"""What is in the hub's cache, as `pymllm list` shows it, and what `pymllm rm` removes and leaves."""

from __future__ import annotations

import hashlib
import json
import os
from types import SimpleNamespace

import huggingface_hub.constants as constants
import pytest
import torch

from pymllm.cli import main
from pymllm.loading.packed_file import write_packed
from pymllm.weights.hub_cache import cached_models

COMMIT = "c0ffee" + "0" * 34
CONFIG = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make repositories in a cache as the hub's client does: files by their content, and links to them."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PYMLLM_CACHE", str(tmp_path / "packed"))
    (tmp_path / "packed").mkdir(mode=0o700)

    def add(repo, files, commit=COMMIT):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        for name, data in files.items():
            link, blob = (
                folder / "snapshots" / commit / name,
                folder / "blobs" / hashlib.sha1(data).hexdigest(),
            )
            link.parent.mkdir(parents=True, exist_ok=True)
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(data)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    def pack(name, model):
        account = {"model": str(model)}
        write_packed(tmp_path / "packed" / f"{name}.packed", "key", [torch.zeros(8)], account, 1)

    packed = lambda: sorted(path.stem for path in (tmp_path / "packed").iterdir())  # noqa: E731
    return SimpleNamespace(add=add, pack=pack, packed=packed)


def ids():
    return [model.id for model in cached_models()]


def test_models_of_one_commit_are_removed_one_by_one(cache):
    for name in "abc":
        cache.add(f"org/{name}", CONFIG)
    assert main(["rm", "org/b", "--yes"]) == 0
    assert ids() == ["org/a", "org/c"]


def test_all_revisions_are_removed(cache):
    cache.add("org/a", CONFIG, "1" * 40)
    cache.add("org/a", CONFIG, "2" * 40)
    assert ids() == ["org/a", "org/a"]
    assert main(["rm", "org/a", "--yes"]) == 0 and ids() == []


def test_a_file_that_another_model_has_too_stays(cache):
    folder = cache.add("org/g", {"m-Q8_0.gguf": b"same", "old/m-F16.gguf": b"same", "m-Q4_0.gguf": b"other"})
    assert main(["rm", "org/g:Q8_0", "--yes"]) == 0
    assert (folder / "old/m-F16.gguf").read_bytes() == b"same"
    assert main(["rm", "org/g:F16", "org/g:Q4_0", "--yes"]) == 0
    assert not folder.exists()


def test_what_is_left_of_a_damaged_model_is_shown_and_removed(cache, capsys):
    folder = cache.add("org/a", CONFIG).parents[1]
    for blob in (folder / "blobs").iterdir():
        blob.unlink()
    (folder / "blobs" / "x.incomplete").write_bytes(b"12345")
    (model,) = cached_models()
    assert (model.id, model.size, model.complete) == ("org/a", 5 + len(COMMIT), False)
    assert main(["rm", "org/a:Q8_0", "--yes"]) == 1 and "pymllm rm org/a" in capsys.readouterr().err
    assert main(["rm", "org/a", "--yes"]) == 0 and not folder.exists()


def test_packed_weights_are_listed_and_go_with_their_model(cache, tmp_path, capsys):
    a, g = cache.add("org/a", CONFIG), cache.add("org/g", {"m-Q8_0.gguf": b"8", "m-Q4_0.gguf": b"4"})
    places = {
        "a": a,
        "g8": g / "m-Q8_0.gguf",
        "g4": g / "m-Q4_0.gguf",
        "own": tmp_path / "own",
        "o": tmp_path / "o",
    }
    for name, place in places.items():
        cache.pack(name, place)
    (tmp_path / "packed" / "damaged.packed").write_bytes(b"x")
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["packed"]
    assert {one["model"] for one in listed} == {*map(str, places.values()), None}
    assert main(["list"]) == 0 and capsys.readouterr().out.count(" packed ") == 6
    assert main(["rm", "org/g:q8_0", "-y"]) == 0 and cache.packed() == ["a", "damaged", "g4", "o", "own"]
    assert main(["rm", "org/a", "--packed", "-y"]) == 0 and cache.packed() == ["damaged", "g4", "o", "own"]
    assert "org/a" in ids()
    (tmp_path / "own").mkdir()
    assert main(["rm", str(tmp_path / "own"), "-y"]) == 0 and cache.packed() == ["damaged", "g4", "o"]
    assert (tmp_path / "own").is_dir()
    assert main(["rm", "--packed"]) == 2 and main(["rm", "--packed", "-y"]) == 0 and cache.packed() == []
    assert main(["rm"]) == 2
