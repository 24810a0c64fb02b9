"""A real uvicorn on a loopback port, in a thread, with the official client before it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

import pymllm
from pymllm.server.app import create_app
from pymllm.server.listening import DrainingServer, configure
from tests.processes import SECONDS

MODEL = "shipped"


@dataclass
class Served:
    """app's model, the app, and where it answers."""

    llm: Any
    app: Any
    url: str
    port: int

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=SECONDS)


@contextlib.contextmanager
def serve(llm: Any, **settings: Any) -> Iterator[Served]:
    """Run the app until the block ends."""
    app = create_app(llm, **{"model_name": MODEL, **settings})
    server = DrainingServer(configure(app))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        try:
            yield Served(llm, app, f"http://127.0.0.1:{port}", port)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(SECONDS)


@pytest.fixture(scope="session")
def served(llm: pymllm.LLM) -> Iterator[Served]:
    with serve(llm) as running:
        yield running


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()
