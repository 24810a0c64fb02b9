"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import pymllm

# `python -O` leaves out pymllm's asserts; those of tests stay, and those of the modules that they import stay by this.
pytest.register_assert_rewrite(
    *(f"tests.{path.stem}" for path in Path(__file__).parent.iterdir() if path.suffix in ("", ".py"))
)

# Tiny matrices: more threads only wait for each other, the more so with several test workers on few cores.
torch.set_num_threads(1)
# Without a GPU, Triton's interpreter runs the GPU kernels. It must be asked for before Triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Keeps what verbs keep for their user, packed weights and lines of chats, out of the home of the tester."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYMLLM_CACHE", str(tmp_path_factory.mktemp("packed") / "weights"))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def torch_threads():
    """Sets torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm() -> pymllm.LLM:
    """The shipped model."""
    return pymllm.LLM(progress=False)
