"""README.md and docs/: every code block is run, in the page's order, and shows what the page shows."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ImportError:
    import tomli as tomllib

import pymllm
from benchmarks.first_contact.__main__ import read_settings

from .blocks import LANGUAGES, Block, read_blocks
from .commands import (
    COLUMNS,
    ROOT,
    agrees,
    read_commands,
    read_shown,
    run_command,
    show_command,
    split_command,
)
from .desk import lay_out
from .served import Server, one_server

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if any(block.language != "text" for block in read_blocks(page))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("desk"), pymllm.LLM())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_its_blocks_are(page):
    for block in read_blocks(page):
        assert block.language in LANGUAGES, f"{block.where} must be one of {', '.join(LANGUAGES)}"
        assert block.language in ("text", "json") or all(
            len(line) <= 120 for line in block.text.split("\n")
        ), block.where
        if block.language == "console":
            assert block.text.startswith("$ "), f"{block.where} must begin with a command"


@pytest.fixture
def own_searches(tmp_path, monkeypatch):
    """Keeps what searches have measured out of the home of the tester; the caches of other programs stay."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    others = {"HF_HOME": "huggingface", "PIP_CACHE_DIR": "pip", "PLAYWRIGHT_BROWSERS_PATH": "ms-playwright"}
    for name, folder in others.items():
        monkeypatch.setenv(name, os.environ.get(name) or str(cache / folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
@pytest.mark.usefixtures("own_searches")
def test_a_page_does_what_it_shows(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    left_out, names = [], {"__name__": "__main__"}
    serves = any("pymllm serve" in block.text for block in read_blocks(page) if block.not_run is None)
    with one_server() if serves else contextlib.nullcontext() as server:
        for block in read_blocks(page):
            if block.needs is not None and importlib.util.find_spec(block.needs) is None:
                left_out.append(f"{block.where} needs {block.needs}")
            elif block.language == "python":
                run_python(block, names)
            elif block.language == "sh":
                for command in read_commands(block.text):
                    run_line(block, command, desk, server, monkeypatch)
            elif block.language == "console":
                for shown in read_shown(block.text):
                    code, found = show_command(shown.command, desk)
                    assert code == 0 and agrees(shown.output, found), (
                        f"{block.where}: $ {shown.command} gives at {COLUMNS} columns (exit code {code}):\n"
                        + "\n".join(found)
                    )
            elif block.language == "json":
                assert [json.loads(line) for line in block.text.split("\n")], block.where
            elif block.language == "yaml":
                assert list(yaml.safe_load_all(block.text)), block.where
    if left_out:
        pytest.skip("; ".join(left_out))


def run_python(block: Block, names: dict) -> None:
    """Run a block with the names of the page's blocks before it."""
    program = compile(
        "\n" * (block.line - 1) + block.text, str(block.page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    )
    if block.not_run is not None:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        if program.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(program, names))
        else:
            exec(program, names)


def run_line(
    block: Block, command: str, desk: Path, server: Server | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a command, or look only whether it is one."""
    words = shlex.split(command)
    if words[:3] == ["python3", "-m", "benchmarks.first_contact"]:
        read_settings(words[3:])  # tests/first_contact runs it
    elif words[0] == "python3":
        assert words[1:3] == ["-m", "venv"], f"{block.where}: {command}"  # what it makes is tested by hand
    elif words[0] == "make":
        assert set(word for word in words[1:] if "=" not in word) <= TARGETS, f"{block.where}: {command}"
        for word in words:
            if word.startswith("GPU_ARGS="):
                read_settings(shlex.split(word.removeprefix("GPU_ARGS=")))
    elif words[:2] == ["pip", "install"]:
        assert_installs(block, words[2:])
    elif block.not_run is not None:
        assert_parses(block, command)
    elif words[:2] == ["pymllm", "serve"]:
        assert server is not None
        server.start(command, desk)
    elif words[0] == "export":
        name, _, value = words[1].partition("=")
        monkeypatch.setenv(name, value)
    else:
        code, printed = run_command(command, desk)
        assert code == 0, f"{block.where}: {command} ended with {code}:\n{printed[-3000:]}"


def assert_parses(block: Block, command: str) -> None:
    """Look whether the command line knows all words of a command."""
    from pymllm.cli import _parse, _parser

    for one in split_command(command):
        if one[0] == "pymllm":
            try:
                _parse(_parser(one[1:]), one[1:])
            except SystemExit:
                raise AssertionError(f"{block.where}: {command} is not understood") from None


def assert_installs(block: Block, words: list[str]) -> None:
    """Look whether what is installed of this project are extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for word in words:
        own = re.fullmatch(r"(?:\.|pymllm-dispatch)(?:\[(.+)\])?", word)
        assert own or word.startswith("-"), f"{block.where}: {word} is no package of this project"
        if own and own[1]:
            assert set(own[1].split(",")) <= extras.keys(), f"{block.where}: {word}"
