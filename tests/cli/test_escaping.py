"""What the command line prints of a hostile file: nothing that a terminal takes for a command."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from pymllm.cli import output

HOSTILE = "a\x1b[2J\x9b31m\u202eb\u200b\ud800\x07"
SHOWN = r"a\x1b[2J\x9b31m\u202eb\u200b\ud800\x07"


def test_lines_tables_and_logs_are_escaped_alike(capsys):
    from rich.table import Table

    output.say(f"{HOSTILE}\nnext")
    output.show(HOSTILE)
    table = Table("name")
    table.add_row(HOSTILE)
    output.console().print(table)
    output.console().print(HOSTILE)
    record = logging.LogRecord("pymllm", logging.WARNING, "", 0, "%s", (f"{HOSTILE}\n",), None)
    sys.stderr.write(output._Lines("%(message)s").format(record) + "\n")
    out, err = capsys.readouterr()
    assert out.count(SHOWN) == 3 and err == f"{SHOWN}\nnext\n{SHOWN}\\n\n"
    assert (out + err).replace("\n", "").isprintable()


def test_json_means_the_same_and_prints(capsys):
    value = {HOSTILE: [HOSTILE, "\U000e0001", "\u00fc \u65e5", float("nan")]}
    output.print_json(value)
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and "\u65e5" in text
    assert json.loads(text) == {HOSTILE: [HOSTILE, "\U000e0001", "\u00fc \u65e5", None]}


@pytest.mark.parametrize("terminal", (True, False))
def test_a_models_text_cannot_steer_a_terminal_and_is_whole_in_a_file(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    family = "\U0001f468\u200d\U0001f469"  # joined by a character that does not print
    output.show_text(f"{family}\n\t\x1b[2J\x9b")
    shown = r"\x1b[2J\x9b" if terminal else "\x1b[2J\x9b"
    assert capsys.readouterr().out == f"{family}\n\t{shown}"
