"""The commands of `sh` and `console` blocks, run as a reader does: in a shell, or here where that is the same."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pymllm

ROOT = Path(__file__).parents[2]
# What the shell has to do itself.
SHELL = re.compile(r"[|<>;&`$*?~]|^(export|cd) ")
COLUMNS = 100


def split_command(command: str) -> list[list[str]]:
    """Split what a shell is told into the words of its programs, without their redirections."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    programs: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if set(word) <= set("<>"):
            next(words)
        elif set(word) <= set("|&;"):
            programs.append([])
        else:
            programs[-1].append(word)
    return [program for program in programs if program]


@dataclass(frozen=True)
class Shown:
    """A command of a `console` block, and what stands below it."""

    command: str
    output: list[str]


def read_commands(text: str) -> list[str]:
    """Read the commands of an `sh` block: comments at the end of lines left out, continued lines joined."""
    joined = re.sub(r" *\\\n\s*", " ", text)
    lines = (re.sub(r"(^|\s+)#(\s.*|$)", "", line).rstrip() for line in joined.split("\n"))
    return [line for line in lines if line]


def read_shown(text: str) -> list[Shown]:
    """Read a `console` block."""
    shown: list[Shown] = []
    for line in text.split("\n"):
        if line.startswith("$ "):
            shown.append(Shown(line[2:], []))
        else:
            shown[-1].output.append(line)
    return shown


def reader_environment() -> dict[str, str]:
    """Make the environment of a reader's shell: this Python's programs first, and this tree's pymllm."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tree = str(Path(pymllm.__file__).parents[1])
    searched = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PATH": programs, "PYTHONPATH": searched}


def run_command(command: str, folder: Path) -> tuple[int, str]:
    """Run a command in a folder.  Returns its exit code and what it printed, both streams in one."""
    words = [] if SHELL.search(re.sub(r"'[^']*'", "", command)) else shlex.split(command)
    if words[:1] == ["pymllm"] and words[1:2] != ["serve"]:
        return _run_here(words[1:], folder)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=reader_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def _run_here(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a verb in this process, which has imported everything already."""
    from pymllm.cli import main

    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    before, stdin = Path.cwd(), sys.stdin
    try:
        os.chdir(folder)
        with (
            open(os.devnull) as sys.stdin,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            code = main(words)
    finally:
        os.chdir(before)
        sys.stdin = stdin
    return code, printed.buffer.getvalue().decode()  # type: ignore[attr-defined]


def show_command(command: str, folder: Path) -> tuple[int, list[str]]:
    """Run a command on a terminal.  Returns its exit code and the lines that the terminal shows in the end."""
    import pty

    import pyte

    screen = pyte.HistoryScreen(COLUMNS, 500)
    stream = pyte.ByteStream(screen)
    controller, terminal = pty.openpty()
    environment = {
        **reader_environment(),
        "COLUMNS": str(COLUMNS),
        "LINES": "500",
        "NO_COLOR": "1",
        "TERM": "xterm",
    }
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"stty cols {COLUMNS} rows 500; {command}"],
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    with contextlib.suppress(OSError):  # the terminal is gone once its last user is
        while data := os.read(controller, 1 << 16):
            stream.feed(data)
    os.close(controller)
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return process.wait(), lines


def agrees(shown: list[str], found: list[str]) -> bool:
    """Tell whether what a page shows is what was printed.  "...": any text; alone on a line: any lines."""
    expected = list(shown)
    while expected and not expected[-1].strip():
        expected.pop()
    pattern = "".join(
        r"(?:.*\n)*?"
        if line.strip() == "..."
        else ".*?".join(map(re.escape, line.rstrip().split("..."))) + r"\n"
        for line in expected
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in found)) is not None
