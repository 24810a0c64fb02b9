"""The recorded chats of docs/casts: they fit their columns, and what they show is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pymllm.cli.chat.commands import COMMANDS
from tests.cli.chat.terminal import record

FOLDER = Path(record.__file__).parent


@pytest.mark.parametrize("name", record.CASTS)
def test_a_cast_fits_its_columns_and_shows_commands_that_exist(name):
    columns, environment = record.CASTS[name]
    text = (FOLDER / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert f"-{columns}" in name and ("NO_COLOR" in environment) == ("no-color" in name)
    assert all(len(line) <= columns for line in lines) and max(map(len, lines)) > columns * 2 // 3
    assert all(line.isprintable() for line in lines)
    assert lines[0] == " ".join(["$ pymllm chat", record.NAME, *record.OPTIONS])
    called = re.findall(r"^>>> /([a-z]+)", text, re.MULTILINE)
    assert "nonsense" in called and set(called) - {"nonsense"} <= set(COMMANDS)
    # Everything that the script types is to be seen.
    typed = [part for step, _ in record.STEPS for part in step.split("\r") if part.isprintable() and part]
    assert all(any(line.endswith(part) for line in lines) for part in typed)


def test_every_cast_has_its_recording():
    assert {path.name for path in FOLDER.glob("*.txt")} == set(record.CASTS)
