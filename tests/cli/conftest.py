"""What tests of the command share: a clean environment, the shipped model, a tiny checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """No rank of somebody's torchrun, no forced kernel path; the logger as other tests know it."""
    for name in ("RANK", "WORLD_SIZE", "PYMLLM_CPU_ISA", "PYMLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    logger = logging.getLogger("pymllm")
    before = logger.level, logger.handlers, logger.propagate
    yield
    logger.level, logger.handlers, logger.propagate = before


@pytest.fixture(scope="session")
def awq(tmp_path_factory) -> Path:
    """A tiny AWQ checkpoint without a tokenizer."""
    folder = tmp_path_factory.mktemp("awq")
    write_checkpoint(folder, "llama", "awq-g64")
    return folder
