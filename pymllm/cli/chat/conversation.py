"""The messages of a conversation: how they are taken back, and how they are written to a file and read again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pymllm.cli.chat.attachments import read_text
from pymllm.disk import check_path, write_whole
from pymllm.errors import ConfigError

MAX_FILE_BYTES = 64 << 20
SCHEMA_VERSION = 1
ROLES = ("user", "assistant")
FIELDS = ("role", "content", "reasoning_content", "ended")


@dataclass
class Conversation:
    """A conversation so far.

    system: the system prompt; None: there is none, or the template has its own.
    messages: the rest, {"role": "user" or "assistant", "content": ...} each. An answer may have its thoughts as
    "reasoning_content", and as "ended" what ended it, where that was not the model: "length" or "stopped".
    """

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def whole(self) -> list[dict[str, str]]:
        """Return all messages, the system prompt first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.messages]

    def for_model(self) -> list[dict[str, Any]]:
        """Return all messages as the model gets them."""
        return [
            {name: value for name, value in message.items() if name != "ended"} for message in self.whole()
        ]

    def last_exchange(self) -> int | None:
        """Return the place of the user's last message; None: there is none."""
        places = (at for at in reversed(range(len(self.messages))) if self.messages[at]["role"] == "user")
        return next(places, None)

    def take_back(self) -> list[dict[str, str]]:
        """Remove the user's last message and what follows it.  Returns these; [] where there is none."""
        place = self.last_exchange()
        if place is None:
            return []
        taken, self.messages = self.messages[place:], self.messages[:place]
        return taken


def save_conversation(path: Path, conversation: Conversation, model: str) -> None:
    """Write a conversation, whole or not at all.  ConfigError where it cannot be, or would replace another file."""
    check_path(path)
    if os.path.lexists(path):
        try:
            load_conversation(path)
        except ConfigError:
            raise ConfigError(
                "there is a file already, and it is no conversation",
                code="conversation-file",
                file=str(path),
                fix="Choose another name.",
            ) from None
    made = {"schema_version": SCHEMA_VERSION, "model": model, "messages": conversation.whole()}
    text = json.dumps(made, indent=2, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, which a name of a file may have, is no text.
    data = text.encode("utf-8", "replace")
    write_whole(path, [data], len(data))


def load_conversation(path: Path) -> Conversation:
    """Read a file of `save_conversation`, or a bare list of messages as OpenAI's API has them.  ConfigError if none."""
    text = read_text(path, MAX_FILE_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "JSON", str(error) or type(error).__name__) from None
    listed = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(listed, list):
        raise _refusal(path, 'a list of messages, or an object with "messages"', type(listed).__name__)
    messages = [_message(path, place, message) for place, message in enumerate(listed)]
    system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
    return Conversation(system, messages)


def _message(path: Path, place: int, message: Any) -> dict[str, str]:
    where = f"messages[{place}]"
    if not isinstance(message, dict):
        raise _refusal(path, "an object", type(message).__name__, where)
    roles = ("system", *ROLES) if place == 0 else ROLES
    if message.get("role") not in roles:
        raise _refusal(path, f"the role {' or '.join(roles)}", repr(message.get("role")), where)
    made = {name: message[name] for name in FIELDS if message.get(name) is not None}
    for name in ("content", *made):
        if not isinstance(made.get(name), str):
            raise _refusal(path, f"a text as {name}", type(made.get(name)).__name__, where)
    return made


def _refusal(path: Path, expected: str, found: str, where: str | None = None) -> ConfigError:
    return ConfigError(
        "this is no conversation",
        code="conversation-file",
        file=str(path),
        tensor=where,
        expected=expected,
        found=found[:200],
        fix="Give a file that /save has written.",
    )
