"""Files that a message names by @path."""

from __future__ import annotations

import os

import pytest

from pymllm.cli.chat.attachments import MAX_BYTES, attach
from pymllm.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("héllo\n", encoding="utf-8")
    (tmp_path / "my notes").write_text("spaced", encoding="utf-8")
    (tmp_path / "fenced.md").write_text("```\ncode\n```\n")
    (tmp_path / "bom.txt").write_bytes("\ufeffx".encode())
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "large.txt").write_bytes(b"x" * (MAX_BYTES + 1))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("See @notes.txt.", "See notes.txt.\n\nnotes.txt:\n```\nhéllo\n```"),
        ("(@notes.txt) and @notes.txt?", "(notes.txt) and notes.txt?\n\nnotes.txt:\n```\nhéllo\n```"),
        ('Read @"my notes" now', "Read my notes now\n\nmy notes:\n```\nspaced\n```"),
        ("@fenced.md", "fenced.md\n\nfenced.md:\n````\n```\ncode\n```\n````"),
        ("@bom.txt", "bom.txt\n\nbom.txt:\n```\nx\n```"),
    ],
)
def test_the_text_of_a_file_comes_along(message, expected):
    assert attach(message)[0] == expected


@pytest.mark.parametrize(
    "message",
    ["ada@notes.txt", "me@example.org", "@ada said", "a @ b", "@", "@dataclass(frozen=True)", "@3.5"],
)
def test_an_at_that_names_no_file_stays_text(message):
    assert attach(message) == (message, [])


def test_a_backslash_keeps_an_at():
    assert attach(r"\@notes.txt and \@nothing.txt") == ("@notes.txt and @nothing.txt", [])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("@note.txt", "Nearest: notes.txt"),
        ("@no/such", "no such file"),
        ("@~nobody-of-that-name/x", "no such file"),
        ('@"no such"', "no such file"),
        ("@image.png", "no text"),
        ("@latin.txt", "byte 0xe9 at 0"),
        ("@large.txt", f"at most {MAX_BYTES} bytes"),
        ("@folder", "not a regular file"),
        ("@pipe", "not a regular file"),
        ("@a\x00/b", "a"),
    ],
)
def test_a_file_that_cannot_come_along_is_one_error(message, words):
    with pytest.raises(ConfigError) as caught:
        attach(message)
    assert words in str(caught.value) and "\n" not in str(caught.value)
