"""A real `pymllm serve` of the shipped model before real clients.

The clients live in an environment of their own, where neither torch nor pymllm is: `make clients-check` makes it, and
names the Python of the server in PYMLLM_SERVER_PYTHON. Without that these tests are not collected.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PYTHON = os.environ.get("PYMLLM_SERVER_PYTHON")
ROOT = Path(__file__).parents[2]
KEY = "a key of ours"
# How long a client waits for a busy machine; no test proves anything by it.
SECONDS = 300

collect_ignore_glob = [] if PYTHON else ["test_*.py"]


@dataclass(frozen=True)
class Server:
    """A server that runs.  root: where it answers.  model: what clients call its model."""

    root: str
    model: str = "pymllm-shipped"
    key: str = KEY

    @property
    def url(self) -> str:
        """Where OpenAI's API begins."""
        return f"{self.root}/v1"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    assert PYTHON is not None
    command = [PYTHON, "-m", "pymllm", "serve", "--port", "0", "--pooling", "mean", "--dtype", "float32"]
    environment = {**os.environ, "PYMLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        lines: list[str] = []
        try:
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Serving "):
                    break
            else:
                pytest.fail(f"the server did not start:\n{''.join(lines)}")
            # A full pipe would stop the server.
            threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
            root = line.split(" at ")[1].split("/v1")[0]
            yield Server(root)
            assert process.poll() is None, "".join(lines)
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No key, address or proxy of this machine reaches a client, and none writes to the home of whoever runs it."""
    for name in list(os.environ):
        if (
            name.startswith(("OPENAI_", "ANTHROPIC_", "LITELLM_", "LANGCHAIN_", "LANGSMITH_"))
            or "proxy" in name.lower()
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
