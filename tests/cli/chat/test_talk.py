"""A conversation with the shipped model: history, commands, thoughts, and what is refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence

import pytest

import pymllm
from pymllm.cli.chat.answering import Answerer
from pymllm.cli.chat.conversation import Conversation
from pymllm.cli.chat.reading import Reader
from pymllm.cli.chat.screen import Screen
from pymllm.cli.chat.settings import Settings
from pymllm.cli.chat.talk import Talk
from pymllm.text.chat_template import ChatTemplate
from pymllm.text.dialect import dialect_of

GREEDY = {"temperature": 0.0, "max_tokens": 6, "repetition_penalty": 1.0}
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
IN_TURN = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + PLAIN
)
# As Qwen3's: the switch closes the thoughts before they begin.
THINKING = PLAIN + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
OPENED = PLAIN + "<think>\n"


class Lines(Reader):
    """Gives lines, and then ends."""

    def __init__(self, lines: Sequence[str], interactive: bool = True) -> None:
        self.lines, self.interactive = list(lines), interactive

    def _line(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)


class Recorder(Screen):
    """Keeps what is shown, by kind; at a piece of an answer, does what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.thoughts, self.notes, self.errors = [""], "", [], []
        self.at_piece = lambda: None

    def answer(self, text: str) -> None:
        self.answers[-1] += text
        self.at_piece()

    def thought(self, text: str) -> None:
        self.thoughts += text

    def end(self) -> None:
        if self.answers[-1]:
            self.answers.append("")

    def note(self, text: str, indent: str = "") -> None:
        self.notes.append(text)

    def error(self, error: object) -> None:
        self.errors.append(str(error))


@pytest.fixture
def chat(llm, monkeypatch):
    """Runs lines through a chat, with another template if one is given."""

    def run(
        *lines: str, template: str = "", of: pymllm.LLM = llm, system: str | None = None, **settings
    ) -> Talk:
        if template:
            monkeypatch.setattr(
                of.tokenizer, "chat_templates", {"default": ChatTemplate(template, "t.jinja")}
            )
        talk = run.talk = Talk(
            Answerer(of, dialect_of(of.tokenizer), None),
            Conversation(system),
            Settings(**{"sampling": GREEDY, **settings}),
            Lines(lines),
            Recorder(),
        )
        talk.run()
        return talk

    return run


def said(llm, messages) -> str:
    """What the model answers, by the library's own front door."""
    return llm.chat(messages, llm.default_params(**GREEDY)).text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_turn_has_those_before_it_and_reads_them_from_the_cache(llm, chat):
    first = "def add(a, b): return a + b  # " + "long " * 40 + "end"
    talk = chat(first, "def sub(", system="Write code.", stats=True)
    before = {"role": "system", "content": "Write code."}
    one = said(llm, [before, user(first)])
    two = said(llm, [before, user(first), assistant(one), user("def sub(")])
    assert talk.screen.answers[:2] == [one, two]
    cut = {"ended": "length"}
    kept = [user(first), assistant(one) | cut, user("def sub("), assistant(two) | cut]
    assert talk.conversation.messages == kept
    lines = [note for note in talk.screen.notes if "prompt tokens" in note]
    assert "reused" in lines[1] and "6 tokens at" in lines[1] and "ended by length" in lines[1]


def test_retry_undo_clear_and_system_change_what_is_kept(llm, chat):
    talk = chat("def f(", "/retry", "/set temperature 0.9", "/undo", "/undo", "def g(", "/system Be short.")
    one = said(llm, [user("def f(")])
    assert talk.screen.answers[:2] == [one, one]
    assert talk.conversation.messages[0] == user("def g(") and len(talk.conversation.messages) == 2
    assert talk.conversation.system == "Be short." and talk.settings.sampling["temperature"] == 0.9
    assert talk.screen.errors == ["/undo: there is nothing to take back."]
    assert chat("def f(", "/system a", "/new", "/system none").conversation == Conversation()


def test_ctrl_c_ends_the_answer_and_the_history_keeps_what_was_said(llm, chat, monkeypatch):
    shown = Recorder.answer

    def interrupt(self, text):
        shown(self, text)
        if len(self.answers) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "answer", interrupt)
    before = signal.getsignal(signal.SIGINT)
    talk = chat("def f(", "def g(", sampling={**GREEDY, "max_tokens": 200})
    first = talk.conversation.messages[1]
    whole = llm.chat([user("def f(")], llm.default_params(**{**GREEDY, "max_tokens": 200})).text
    assert first["ended"] == "stopped" and first["content"] == talk.screen.answers[0]
    assert whole.startswith(first["content"]) and len(first["content"]) < len(whole)
    assert talk.screen.notes[0] == "(stopped by you)" and len(talk.conversation.messages) == 4
    assert signal.getsignal(signal.SIGINT) == before and llm.engine.idle


def test_a_message_that_was_stopped_before_its_answer_is_not_kept_and_can_be_sent_again(
    llm, chat, monkeypatch
):
    render, calls = llm.tokenizer.apply_chat_template, []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return render(*given, **named)

    monkeypatch.setattr(llm.tokenizer, "apply_chat_template", interrupted)
    talk = chat("def f(", "/retry")
    assert "not kept" in talk.screen.notes[0]
    assert talk.conversation.messages[0] == user("def f(") and len(talk.conversation.messages) == 2


def test_a_full_context_is_told_and_nothing_is_lost(chat):
    small = pymllm.LLM(progress=False, max_model_len=64)
    talk = chat("def f(", "word " * 70, "/undo", "def g(", "def h(", of=small, sampling={"temperature": 0.0})
    too_long, again = talk.screen.errors
    for part in (
        "with this message is too long for the context of 64 tokens",
        "nothing is lost",
        "/undo or /clear",
    ):
        assert part in too_long
    full = next(note for note in talk.screen.notes if "is full" in note)
    assert "/undo" in full and "/clear" in full
    assert talk.conversation.messages[0] == user("def g(") and len(talk.conversation.messages) == 2
    assert talk.conversation.messages[1]["ended"] == "length" and "too long" in again


@pytest.mark.parametrize(
    ("template", "lines", "words"),
    [
        (NO_SYSTEM, ["def f(", "/system Be short."], "no place for a system prompt"),
        (IN_TURN, ["def f(", "/load twice.json"], "roles must alternate"),
    ],
)
def test_what_the_template_refuses_leaves_the_conversation_as_it_was(
    chat, tmp_path, monkeypatch, template, lines, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.json").write_text(json.dumps([user("a"), user("b")]))
    talk = chat(*lines, template=template)
    assert len(talk.screen.errors) == 1 and words in talk.screen.errors[0]
    assert talk.conversation.system is None and talk.conversation.messages[0] == user("def f(")
    assert len(talk.conversation.messages) == 2


def test_thoughts_are_told_apart_hidden_and_kept(chat):
    answer = {**GREEDY, "max_tokens": 60, "regex": r"<think>\nhm so\n</think>\n\nyes"}
    talk = chat("x", template=THINKING, sampling=answer)
    assert (talk.screen.thoughts, talk.screen.answers[0]) == ("hm so", "yes")
    assert talk.conversation.messages[1] == assistant("yes") | {"reasoning_content": "hm so"}
    hidden = chat("x", template=THINKING, sampling=answer, thinking="hide")
    assert (hidden.screen.thoughts, hidden.screen.answers[0]) == ("", "yes")
    opened = chat(
        "x", template=OPENED, sampling={**GREEDY, "max_tokens": 60, "regex": r"hm\n</think>\n\nyes"}
    )
    assert (opened.screen.thoughts, opened.screen.answers[0]) == ("hm", "yes")


def test_the_switch_of_thoughts_reaches_the_template(llm, chat):
    talk = chat("x", "/thinking on", "/thinking off", template=THINKING)
    variables = talk.settings.variables(talk.answerer.dialect)
    assert variables == {"enable_thinking": False} and not talk.screen.errors
    prompts = [
        llm.tokenizer.render_chat([user("x")], variables=given)
        for given in (variables, {"enable_thinking": True})
    ]
    assert "</think>" in prompts[0] and "</think>" not in prompts[1]


@pytest.mark.parametrize(
    ("template", "mode", "words"),
    [
        (PLAIN, "on", "no switch for thoughts"),
        (PLAIN, "off", "nothing to turn off"),
        (OPENED, "on", "no switch for thoughts"),
        (OPENED, "off", "no switch for thoughts"),
        (PLAIN, "sometimes", "no mode of thinking"),
    ],
)
def test_a_template_without_the_switch_is_told(chat, template, mode, words):
    talk = chat(f"/thinking {mode}", template=template)
    assert any(words in text for text in [*talk.screen.errors, *talk.screen.notes])
    if talk.screen.errors:
        assert talk.settings.thinking == "default"


def test_a_conversation_is_saved_and_loaded_again(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    talk = chat(
        "/system Be kind.",
        "def é(",
        "/save a b.json",
        "/save a b.json",
        "/save other.json",
        "/save no/x.json",
    )
    kept = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert kept["messages"] == [{"role": "system", "content": "Be kind."}, *talk.conversation.messages]
    assert ["no conversation" in error for error in talk.screen.errors] == [True, False]
    assert (tmp_path / "other.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.json", "other.json"]
    again = chat("/load a b.json", "/load other.json", "/load nothing.json")
    assert again.conversation == talk.conversation and len(again.screen.errors) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "3",
        '{"messages": 3}',
        "[3]",
        '[{"role": "user"}]',
        '[{"role": "user", "content": [1]}]',
        '[{"role": "tool", "content": "x"}]',
        '[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]',
        '[{"role": "user", "content": "x", "ended": 1}]',
        "[" * 100000,
        '{"messages": [{"role": "user", "content": "x\\u0000"}]}\x00',
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(chat, tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    talk = chat("/system Stay.", f"/load {tmp_path}/bad.json")
    assert len(talk.screen.errors) == 1 and "bad.json" in talk.screen.errors[0]
    assert talk.conversation == Conversation("Stay.")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/retyr", "Nearest: /retry"),
        ("/set", "/set NAME VALUE"),
        ("/set temperatur 1", "Nearest: temperature"),
        ("/set temperature -1", "from 0 to 100"),
        ("/set temperature nan", "from 0 to 100"),
        ("/set top_k many", "a whole number"),
        ("/stats maybe", "/stats on|off"),
        ("/clear all", "/clear"),
        ("/retry", "no message to answer"),
        ("/save", "/save FILE"),
        ("/load", "/load FILE"),
        ("/save a\x00b", "path"),
    ],
)
def test_a_command_that_cannot_be_is_one_error(chat, line, words):
    talk = chat(line)
    assert len(talk.screen.errors) == 1 and words in talk.screen.errors[0]
    assert talk.settings.sampling == GREEDY and talk.failed and talk.conversation == Conversation()


def test_settings_change_and_go_back(chat):
    talk = chat(
        "/set temperature 0.5",
        "/set stop END",
        "/set max-tokens default",
        "/set seed 7",
        "/show",
        "/stats on",
    )
    assert talk.settings.sampling == {
        "repetition_penalty": 1.0,
        "temperature": 0.5,
        "stop": ["END"],
        "seed": 7,
    }
    shown = "\n".join(talk.screen.notes)
    for part in (
        "max_tokens is not limited",
        "temperature 0.5",
        "seed 7",
        "'END'",
        "native_int4",
        "template.jinja",
    ):
        assert part in shown
    assert talk.settings.stats


def test_lines_that_are_messages_are_sent_as_they_are(chat):
    lines = [
        " /help",
        "/usr/bin is a folder",
        "//x",
        "/retyr\nof two lines",
        '"""',
        "@nothing.txt",
        " /exit",
        'end"""',
    ]
    talk = chat(*lines, sampling={**GREEDY, "max_tokens": 1})
    sent = [message["content"] for message in talk.conversation.messages if message["role"] == "user"]
    assert sent == [
        "/help",
        "/usr/bin is a folder",
        "//x",
        "/retyr\nof two lines",
        "@nothing.txt\n /exit\nend",
    ]
    assert not talk.screen.errors
    assert "three quotes" in chat('"""', "x").screen.errors[0]


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", "/EXIT"])
def test_commands_leave(chat, line):
    assert chat(line, "def f(").conversation == Conversation()


def test_help_names_every_command(chat):
    from pymllm.cli.chat.commands import COMMANDS

    text = "\n".join(chat("/help").screen.notes)
    assert all(f"/{name}" in text for name in COMMANDS)
