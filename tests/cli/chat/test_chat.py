"""`pymllm chat` as a command whose stdin is a pipe, what it refuses before it loads, and what its screen shows."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys

import pytest

from pymllm.api import shipped_model
from pymllm.cli import main
from pymllm.cli.chat.history import MOST_BYTES, MOST_LINES, InputHistory
from pymllm.cli.chat.screen import Screen
from pymllm.cli.chat.wrapping import Wrapper
from tests.cli.commands import assert_one_error
from tests.embedding.encoders import make_model, write

GREEDY = ["--temperature", "0", "--max-tokens", "6", "--repetition-penalty", "1"]


@pytest.fixture
def stdin(monkeypatch):
    """Gives the command its input."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


@pytest.fixture
def no_load(monkeypatch):
    """Fails where weights are read."""

    def load(*given, **named):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("pymllm.api.llm.load_prepared", load)


def test_each_line_of_a_pipe_is_a_turn_and_only_answers_go_to_stdout(llm, stdin, capsys):
    stdin("def é(\n\nimport\n/stats on\ndef g(".encode())
    code = main(["chat", *GREEDY])
    captured = capsys.readouterr()
    params = llm.default_params(temperature=0.0, max_tokens=6, repetition_penalty=1.0)
    messages, texts = [], []
    for line in ("def é(", "import", "def g("):
        messages.append({"role": "user", "content": line})
        texts.append(llm.chat(messages, params).text)
        messages.append({"role": "assistant", "content": texts[-1]})
    assert code == 0 and captured.out == "".join(text.rstrip("\n") + "\n" if text else "" for text in texts)
    assert captured.err.count("prompt tokens") == 1 and "\x1b" not in captured.out + captured.err
    assert ">>>" not in captured.out + captured.err


def test_a_quiet_chat_says_what_is_asked_for_alone(stdin, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("a = 1\n")
    stdin(f"def f( @{tmp_path}/notes.txt\n/stats on\n/nonsense\n".encode())
    assert main(["chat", "-q", *GREEDY]) == 1
    captured = capsys.readouterr()
    shown = captured.err.splitlines()
    assert captured.out and len(shown) == 2 and shown[0] == "Statistics are on." and "error: " in shown[1]


def test_a_refused_line_of_a_pipe_is_the_exit_code_and_the_rest_is_answered(stdin, capsys):
    stdin(b"/nonsense\n\xff\xfe\nSee @nothing.txt\ndef f(\n")
    code = main(["chat", *GREEDY])
    captured = capsys.readouterr()
    assert code == 1 and captured.out and captured.err.count("error: ") == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--system", "x", "--chat-template", "{{ raise_exception('never') }}"], "never"),
        (["--system", "x", "--chat-template", "{{ messages[-1].content }}"], "no place for a system prompt"),
        (["--chat-template", "{% for %}"], "not valid"),
        (["--chat-template", "{{ 'no words' }}"], "leaves out what a user writes"),
        (["--thinking", "on"], "no switch for thoughts"),
        (["--temperature", "-1"], "from 0 to 100"),
        (["/no/such/folder"], "/no/such/folder"),
    ],
)
def test_what_can_be_known_is_refused_before_weights_are_read(no_load, stdin, capsys, options, words):
    stdin(b"hello\n")
    assert_one_error(main(["chat", *options]), capsys.readouterr(), words)


def test_a_chat_is_decided_once_with_the_tokenizer_that_was_given(stdin, capsys, tmp_path):
    """A second look at the model would say again what is doubtful about its tokenizer."""
    folder = shutil.copytree(shipped_model(), tmp_path / "other")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "def"}))
    stdin(b"def f(\n")
    code = main(["chat", *GREEDY, "--tokenizer", str(folder)])
    assert code == 0 and capsys.readouterr().err.count("ends no answer") == 1


def test_models_that_cannot_chat_are_refused_before_weights_are_read(
    no_load, stdin, capsys, awq, tmp_path, monkeypatch
):
    stdin(b"hello\n")
    write(tmp_path / "encoder", make_model("bert"), None)
    capsys.readouterr()
    assert_one_error(main(["chat", str(awq)]), capsys.readouterr(), "tokenizer")
    assert_one_error(main(["chat", str(tmp_path / "encoder")]), capsys.readouterr(), "does not generate text")
    monkeypatch.setattr("pymllm.text.tokenizer.read_templates", lambda *given: {})
    assert_one_error(
        main(["chat"]), capsys.readouterr(), "chat template", "--chat-template FILE", "pymllm run --raw"
    )


def test_without_stdin_or_under_torchrun_there_is_no_chat(no_load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat"]) == 2 and "stdin is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_error(main(["chat"]), capsys.readouterr(), "--tensor-parallel-size")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_no_commands_of_a_model_and_no_colours_where_none_are_wanted(
    monkeypatch, environment, colour
):
    for name, value in {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "80", **environment}.items():
        monkeypatch.setenv(name, value)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    screen = Screen()
    screen.thought("hm \x1b]0;x\x07")
    screen.answer("a\x1b[2Jb\r\x9b \ud800 é\tü\n")
    screen.note("file\x1b[2J\u202e")
    screen.error("x")
    assert out.getvalue() == "a\\x1b[2Jb\\r\\x9b \\ud800 é\tü\n"
    assert ("\x1b" in err.getvalue()) == colour and "\x1b]0" not in err.getvalue()
    assert "\x1b[2J" not in err.getvalue() and "\u202e" not in err.getvalue()
    assert "hm" in err.getvalue() and "\\x1b]0;x\\x07" in err.getvalue()


@pytest.mark.parametrize("columns", [1, 7, 20, 80])
@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox jumps over the lazy dog. " * 5,
        "one\n\n  two   three\n" + "x" * 100 + " y",
        "漢字は空白なしで書かれる。" * 5,
        "👩‍🚀 crew\tand 🇫🇷 flag",
        "```\n" + "code " * 40 + "\n```\n" + "prose " * 30,
    ],
)
def test_words_are_broken_into_lines_and_nothing_else_changes(columns, text):
    wrapper, chance, shown, rest = Wrapper(lambda: columns), random.Random(columns), "", text
    while rest:
        cut = chance.randint(1, 9)
        shown, rest = shown + wrapper.feed(rest[:cut]), rest[cut:]
    shown += wrapper.flush()
    assert "".join(shown.split()) == "".join(text.split())
    if columns >= 20 and "```" not in text and text.isascii():
        assert all(len(line.rstrip()) <= columns for line in shown.split("\n") if "x" * 40 not in line)
    if "```" in text:
        assert "code " * 40 in shown


def test_lines_are_kept_for_the_next_chat_and_only_for_their_user(tmp_path):
    file = tmp_path / "state" / "chat_history.jsonl"
    history = InputHistory(file)
    for line in ("one", "two\nlines", "\ud800", "x" * 20_000):
        history.store_string(line)
    assert list(InputHistory(file).load_history_strings()) == ["\ud800", "two\nlines", "one"]
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b'\xff\n3\nnothing\n"kept"\n' * (MOST_BYTES // 20))
    found = list(InputHistory(file).load_history_strings())
    assert set(found) == {"kept"} and file.stat().st_size < MOST_BYTES // 10
    assert file.read_bytes().count(b"\n") == MOST_LINES // 2 and file.stat().st_mode & 0o777 == 0o600
    nowhere = InputHistory(tmp_path / "state" / "chat_history.jsonl" / "x")
    nowhere.store_string("x")
    assert list(nowhere.load_history_strings()) == []
    assert json.loads(file.read_bytes().splitlines()[-1]) == "kept"


def test_tab_completes_commands_their_words_and_paths(tmp_path, monkeypatch):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from pymllm.cli.chat.completing import ChatCompleter

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "my notes").touch()

    def complete(text: str) -> list[str]:
        found = ChatCompleter().get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + one.start_position] + one.text for one in found]

    assert complete("/ret") == ["/retry"] and complete("/thinking o") == ["/thinking on", "/thinking off"]
    assert complete("/set min") == ["/set min_p"] and complete("/load no") == ["/load notes.txt"]
    assert complete("see @no") == ["see @notes.txt"] and complete("@my") == ['@"my notes']
    assert complete('@"my n') == ['@"my notes'] and complete("me@no") == [] and complete("hello") == []
