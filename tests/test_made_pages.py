"""docs/cli.md and docs/api.md against the parsers, signatures and docstrings that they are made from."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import pymllm
from pymllm.cli import VERBS

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
assert _spec is not None and _spec.loader is not None
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)
CLI, API = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("cli", "api"))


@pytest.mark.parametrize("page", (CLI, API), ids=("cli", "api"))
def test_a_page_is_as_its_script_makes_it(page, monkeypatch):
    for name in ("PYMLLM_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    made = pages.make(page)
    assert made == page, "run: python docs/make_pages.py"
    assert pages.make(pages.PART.sub(r"\1what stood there before\n\3", page)) == made


def test_every_verb_and_public_name_is_on_its_page():
    assert [verb for verb in VERBS if f"\n## pymllm {verb}\n" not in CLI] == []
    assert [name for name in pymllm.__all__ if f"\n### `{name}(" not in API] == ["__version__"]


def test_every_variable_that_is_read_is_on_the_page():
    read = set()
    for file in (ROOT / "pymllm").rglob("*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z_]+)\"", file.read_text(encoding="utf-8")))
    assert "PYMLLM_CPU_ISA" in read
    assert sorted(name for name in read if f"`{name}`" not in CLI) == []
