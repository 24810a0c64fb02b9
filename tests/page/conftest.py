"""One Chromium for all tests of the page, and what it looks at: the shipped model's server, or a scripted one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pymllm
from tests.page.browser import Browser, find_chromium, started_browser
from tests.page.scripted import Scripted, scripted_server
from tests.server.conftest import Served, serve


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium, why_not = find_chromium()
    if chromium is None:
        pytest.skip(f"{why_not}; Debian's package is chromium")
    with started_browser(chromium) as running:
        yield running


@pytest.fixture(scope="session")
def served(llm: pymllm.LLM) -> Iterator[Served]:
    with serve(llm) as running:
        yield running


@pytest.fixture
def script() -> Iterator[Scripted]:
    with scripted_server() as running:
        yield running
