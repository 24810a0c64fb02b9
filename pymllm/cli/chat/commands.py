"""The commands of a chat: lines that begin with `/` and the name of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymllm.cli.chat.attachments import expanded
from pymllm.cli.chat.conversation import load_conversation, save_conversation
from pymllm.cli.chat.settings import DEFAULT, THINKING, changed, check_thinking
from pymllm.errors import RequestError, escaped, nearest

if TYPE_CHECKING:
    from pymllm.cli.chat.talk import Talk

NAME = re.compile(r"/([a-z?]+)(?=\s|$)", re.IGNORECASE)
NONE = "none"


class Leave(Exception):
    """The wish to end the chat."""


@dataclass(frozen=True)
class Command:
    """A command.  run: what it does, with the rest of the line.  words: what it takes.  about: for /help."""

    run: Callable[[Talk, str], None]
    words: str
    about: str


def _usage(name: str, found: str = "") -> RequestError:
    words = COMMANDS[name].words
    return RequestError(
        f"/{name} is not used like this",
        code="command",
        tensor="/" + name,
        expected=f"/{name} {words}".rstrip(),
        found=repr(found[:80]) if found else None,
    )


def _alone(name: str, rest: str) -> None:
    if rest:
        raise _usage(name, rest)


def _help(talk: Talk, rest: str) -> None:
    width = max(len(f"/{name} {one.words}".rstrip()) for name, one in COMMANDS.items() if one.about)
    for name, one in COMMANDS.items():
        if one.about:
            talk.screen.note(f"{f'/{name} {one.words}':<{width}}  {one.about}", indent=" " * (width + 2))
    talk.screen.note(
        '\n@PATH in a message puts the text of a file into it, @"..." one with spaces; \\@ is only an @.\n'
        'Lines from """ to """ are one message, as they are; Alt+Enter begins a new line. Ctrl+C ends an answer, '
        "Ctrl+D leaves. Put a space before a / that begins a message."
    )


def _exit(talk: Talk, rest: str) -> None:
    raise Leave


def _clear(talk: Talk, rest: str) -> None:
    _alone("clear", rest)
    talk.conversation.messages, talk.unanswered = [], None
    talk.screen.note("The conversation is empty.")


def _system(talk: Talk, rest: str) -> None:
    conversation = talk.conversation
    if not rest:
        talk.screen.note(
            "There is no system prompt but what the template may have."
            if conversation.system is None
            else f"The system prompt: {conversation.system}"
        )
        return
    before = conversation.system
    conversation.system = None if rest.lower() == NONE else rest
    try:
        talk.check(conversation)
    except Exception:
        conversation.system = before
        raise
    talk.screen.note(
        "The system prompt is gone." if conversation.system is None else "The system prompt is set."
    )


def _set(talk: Talk, rest: str) -> None:
    name, _, value = rest.partition(" ")
    value = value.strip()
    if not name or not value:
        raise _usage("set", rest)
    sampling = changed(talk.settings.sampling, name, value)
    talk.answerer.params(sampling)
    talk.settings.sampling = sampling
    name = name.replace("-", "_")
    shown = getattr(talk.answerer.params(sampling), name)
    talk.screen.note(
        f"{name} is {'not limited' if name == 'max_tokens' and shown is None else escaped(repr(shown))}."
    )


def _show(talk: Talk, rest: str) -> None:
    _alone("show", rest)
    for name, value in talk.describe():
        talk.screen.note(f"{name:<9} {value}", indent=" " * 10)


def _stats(talk: Talk, rest: str) -> None:
    if rest not in ("on", "off"):
        raise _usage("stats", rest)
    talk.settings.stats = rest == "on"
    talk.screen.note(f"Statistics are {rest}.")


def _thinking(talk: Talk, rest: str) -> None:
    if not rest:
        talk.screen.note(f"Thinking is {talk.settings.thinking}.")
        return
    said = check_thinking(rest, talk.answerer.dialect)
    talk.settings.thinking = rest
    talk.screen.note(said or f"Thinking is {rest}.")


def _retry(talk: Talk, rest: str) -> None:
    _alone("retry", rest)
    talk.retry()


def _undo(talk: Talk, rest: str) -> None:
    _alone("undo", rest)
    taken = talk.conversation.take_back()
    if not taken:
        raise RequestError("there is nothing to take back", code="command", tensor="/undo")
    talk.unanswered = None
    words = " ".join(taken[0]["content"].strip().split("\n")[0].split())
    short = words if len(words) <= 50 else f"{words[:47]}..."
    talk.screen.note(f"Taken back: {short}")


def _save(talk: Talk, rest: str) -> None:
    if not rest:
        raise _usage("save")
    path = expanded(rest)
    save_conversation(path, talk.conversation, str(talk.llm.path))
    talk.screen.note(f"Saved: {path}")


def _load(talk: Talk, rest: str) -> None:
    if not rest:
        raise _usage("load")
    path = expanded(rest)
    loaded = load_conversation(path)
    talk.check(loaded)
    talk.conversation, talk.unanswered = loaded, None
    talk.screen.note(f"Loaded: {path}, {len(loaded.messages)} messages.")


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "", "this list"),
    "exit": Command(_exit, "", "leave, as /bye, /quit and Ctrl+D do"),
    "bye": Command(_exit, "", ""),
    "quit": Command(_exit, "", ""),
    "clear": Command(_clear, "", "forget what was said, as /new does"),
    "new": Command(_clear, "", ""),
    "system": Command(_system, f"[TEXT|{NONE}]", "set or show the system prompt"),
    "set": Command(
        _set, "NAME VALUE", f"a sampling setting, e.g. temperature 0.5; {DEFAULT}: the model's own"
    ),
    "show": Command(_show, "", "the settings, and what runs"),
    "stats": Command(_stats, "on|off", "a line about each answer"),
    "thinking": Command(_thinking, f"[{'|'.join(THINKING)}]", "whether the model thinks, and shows it"),
    "retry": Command(_retry, "", "answer the last message anew"),
    "undo": Command(_undo, "", "take back the last message and its answer"),
    "save": Command(_save, "FILE", "write the conversation as JSON"),
    "load": Command(_load, "FILE", "go on with a conversation that was written so"),
}


def find_command(line: str) -> tuple[Command, str] | None:
    """Return the command that a line calls, and the rest of it; None: the line is a message.

    RequestError for a single line that begins like a command, but names none.
    """
    found = NAME.match(line)
    if found is None:
        return None
    name = {"?": "help"}.get(found[1].lower(), found[1].lower())
    if name in COMMANDS:
        return COMMANDS[name], line[found.end() :].strip()
    if "\n" in line.strip():
        return None
    near = nearest(name, COMMANDS).replace("Nearest: ", "Nearest: /").replace(", ", ", /")
    raise RequestError(
        f"there is no command /{name}",
        code="command",
        fix=f"{near} /help lists them; put a space before a / that begins a message.".strip(),
    )
