"""A good checkpoint, copies of it to damage, and what is read of them."""

from __future__ import annotations

import shutil

import pytest

from pymllm.weights.tensor_file import TensorInfo

from ..checkpoints import AWQ, write_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One layer, groups of 64."""
    return write_checkpoint(
        tmp_path_factory.mktemp("good"), "llama", AWQ(64), num_hidden_layers=1, head_dim=32, hidden_size=128
    )


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good.folder, tmp_path / "model")


@pytest.fixture
def reads(monkeypatch):
    """The names of tensors whose data were asked for."""
    names: list[str] = []
    real = TensorInfo.read

    def recording(self, *args, **options):
        names.append(self.name)
        return real(self, *args, **options)

    monkeypatch.setattr(TensorInfo, "read", recording)
    return names
