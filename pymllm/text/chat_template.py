"""A checkpoint's chat template: code from a checkpoint, rendered in a process of its own under limits.

The text is what transformers makes of the same template and messages (children/templates.py). A template gets a second
of processor time, 512 MiB, and a megabyte of text beside what the messages bring; whatever takes more is ended.
"""

from __future__ import annotations

import hashlib
import os
import reprlib
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pymllm.errors import CheckpointError, ConfigError, RequestError
from pymllm.text.bounded import Program, Stopped, encoded, readable

MAX_SECONDS = 1.0
MAX_CHARACTERS = 1 << 20
MAX_MEMORY = 512 << 20

# By the clock: a busy machine takes longer for a second of processor time; where there is no limit on that, sooner.
CLOCK_SECONDS = 2.0 if os.name == "nt" else 10.0

# How many messages of one template are rendered at a time, and how long another waits for its turn.
TOGETHER = 2
QUEUE_SECONDS = 30.0

# A request of so many characters may itself be what takes a template too long.
LARGE_REQUEST = 1 << 16

# The names under which a message may have its reasoning; transformers gives the first to templates in any case.
REASONING = ("reasoning_content", "thinking", "reasoning")

RENDERER = Program("templates", ("jinja2", "markupsafe"), MAX_MEMORY, kept=TOGETHER)


def chat_template_of(given: str | Path) -> ChatTemplate:
    """Read a template that a user gives: a file, or the Jinja text itself.  ConfigError for neither, or a bad one."""
    text = str(given)
    if isinstance(given, str) and any(mark in text for mark in ("{{", "{%", "\n")):
        template = ChatTemplate(text, "--chat-template")
    else:
        try:
            template = ChatTemplate(Path(given).read_text(encoding="utf-8"), text)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the chat template cannot be read: {getattr(error, 'strerror', None) or error}",
                code="chat-template",
                file=text,
                expected="a file of Jinja text in UTF-8, or such text",
            ) from None
    template.check()
    return template


class ChatTemplate:
    """A template.  source: the Jinja text.  file: where it came from, for error messages."""

    def __init__(self, source: str, file: str) -> None:
        self.source, self.file = source, file
        self._key = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        self._turns = threading.BoundedSemaphore(TOGETHER)
        self._forms: dict[str, str] | None = None
        self._loses_text = False
        self._unusable, self._tried = "", False
        self._syntax: dict[str, Any] = {"loops": False, "tests": False}

    def __deepcopy__(self, memo: Any) -> ChatTemplate:
        return self

    @property
    def variables(self) -> Sequence[str]:
        """The names that the template reads, and neither it nor Jinja defines.  CheckpointError as `check` says."""
        if "variables" not in self._syntax:
            self.check()
        return self._syntax["variables"]

    @property
    def wants_parts(self) -> bool:
        """True if a user's content reaches the text as a list of parts only, never as a string."""
        return self.forms["user"] == "parts"

    @property
    def forms(self) -> Mapping[str, str]:
        """The forms of each role's content that come through, "string", "parts" or "both"; tried out once."""
        if self._forms is None:
            self._forms = self._try_forms()
        return self._forms

    def check(self) -> None:
        """Compile the template.  CheckpointError if it is not valid, or if that takes too much time or memory."""
        with self._stopped(large=False), self._turn(), RENDERER.process() as process:
            self._compile(process)

    def check_reads_users(self) -> None:
        """Refuse with a CheckpointError a template that leaves out what a user writes, in whichever form."""
        if self.forms and self._loses_text:
            raise CheckpointError(
                "the chat template leaves out what a user writes, as a string and as a list of parts",
                code="chat-template-refused",
                file=self.file,
                expected="a template that writes the content of messages",
                fix="Give another template with --chat-template, or send plain completions.",
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Write a conversation as text; the arguments are those of `Tokenizer.render_chat`.

        A content of text parts and one of a string are made into each other where the template reads one alone.
        Raises CheckpointError if the template is not valid, takes more than its limits or reaches for what the sandbox
        refuses; RequestError if these are no messages, if the template itself rejects them, if there is no final
        message to continue, or if a large conversation takes more than the limits.
        """
        check_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: an answer goes on with the last "
                "message, or begins a new one",
                code="messages",
                tensor="continue_final_message",
            )
        own = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        for name in ("messages", "tools", *own):
            if name in variables and (name not in own or variables[name] != own[name]):
                raise RequestError(
                    f"the template's variable {name!r} follows from the request itself",
                    code="messages",
                    tensor="chat_template_kwargs",
                    fix=f"Leave {name!r} out of it.",
                )
        given = [self._adapted(_plain(message)) for message in messages]
        if self._syntax["loops"]:
            # It means to read parts, and what they hold is lost.
            self.check_reads_users()
        # A tag that no text has by chance: where it comes to lie, the final message ends.
        final, tag = "", f"CONTINUE_FINAL_MESSAGE_{secrets.token_hex(8)} "
        if continue_final_message:
            given[-1], final = self._tagged(given[-1], tag)
        text = self._render(
            {
                **special_tokens,
                "documents": None,
                **variables,
                "messages": given,
                "tools": None if tools is None else list(tools),
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut(text, final, tag) if continue_final_message else text

    def _adapted(self, message: dict[str, Any]) -> dict[str, Any]:
        """Give a message's content the form that the template reads of its role."""
        content = message.get("content")
        form = self.forms.get(str(message["role"]), self.forms["user"])
        if isinstance(content, str) and form == "parts":
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and form == "string":
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            known = [text for text in texts if isinstance(text, str)]
            if len(known) == len(texts):
                return {**message, "content": "\n".join(known)}
        return message

    def _tagged(self, message: dict[str, Any], tag: str) -> tuple[dict[str, Any], str]:
        """Put the tag behind the text of a message's content.  Returns the message, and the text."""
        content = message.get("content")
        if "content" not in self.source or content is None:
            raise _no_final("the final message has no content, or the template reads none")
        if isinstance(content, str):
            return {**message, "content": content + tag}, content
        listed = content if isinstance(content, Sequence) else ()
        parts = [dict(part) if isinstance(part, Mapping) else part for part in listed]
        for part in reversed(parts):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = part["text"]
                part["text"] = text + tag
                return {**message, "content": parts}, text
        raise _no_final("the final message has no part that is text")

    def _render(self, variables: dict[str, Any]) -> str:
        """Render the template with its variables, whatever they are."""
        asked = {"seconds": MAX_SECONDS, "key": self._key, "variables": variables, "most": MAX_CHARACTERS}
        # Large ones are written in turn, too: that stops all other threads for some milliseconds.
        with self._turn():
            try:
                request = encoded(asked)
            except (TypeError, ValueError, RecursionError) as error:
                raise RequestError(
                    f"the messages cannot be written as JSON: {error}", code="messages", tensor="messages"
                ) from None
            with self._stopped(len(request) > LARGE_REQUEST), RENDERER.process() as process:
                reply = process.ask(request, CLOCK_SECONDS)
                if "unknown" in reply:
                    self._compile(process)
                    reply = process.ask(request, CLOCK_SECONDS)
                if "limit" in reply:
                    # What a process has taken of memory it may never give back.
                    raise Stopped(readable(reply["limit"]), always=True)
        if "text" in reply:
            return reply["text"]
        refused = "refused" in reply
        verb, why = ("rejects", reply["refused"]) if refused else ("fails on", reply["failed"])
        raise RequestError(
            f"the chat template {verb} these messages: {readable(why)}", code="messages", tensor="messages"
        )

    def _compile(self, process: Any) -> None:
        asked = {"seconds": MAX_SECONDS, "key": self._key, "source": self.source}
        reply = process.ask(encoded(asked), CLOCK_SECONDS)
        if "limit" in reply:
            raise Stopped(readable(reply["limit"]), always=True)
        for problem in ("invalid", "failed"):
            if problem in reply:
                raise CheckpointError(
                    f"the chat template is not valid: {readable(reply[problem])}",
                    code="chat-template",
                    file=self.file,
                )
        self._syntax = reply

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for a turn: messages of one template may be slow, and must not take all processors from others."""
        if not self._turns.acquire(timeout=QUEUE_SECONDS):
            raise CheckpointError(
                f"the chat template is slow: these messages waited {QUEUE_SECONDS:.0f} s for others to be rendered",
                code="chat-template-refused",
                file=self.file,
            )
        try:
            yield
        finally:
            self._turns.release()

    @contextmanager
    def _stopped(self, large: bool) -> Iterator[None]:
        """Say what stopped the template.  large: whether the request may have made it do so much."""
        try:
            if self._unusable:
                raise Stopped(self._unusable)
            yield
        except Stopped as stopped:
            if stopped.always and not self._tried:
                # A conversation of a word is tried first: no other will do better, and none need wait for it.
                self._unusable = str(stopped)
            if large:
                raise RequestError(
                    f"the conversation is too large for the chat template, which was stopped: {stopped}",
                    code="messages",
                    tensor="messages",
                    fix="Send fewer or shorter messages.",
                ) from None
            raise CheckpointError(
                f"the chat template was stopped: {stopped}",
                code="chat-template-refused",
                file=self.file,
                expected=f"at most {MAX_SECONDS:.0f} s, {MAX_MEMORY >> 20} MiB and {MAX_CHARACTERS} characters beside "
                "the request's, and nothing out of the sandbox",
                fix="Give another template with --chat-template, or send plain completions.",
            ) from None

    def _try_forms(self) -> dict[str, str]:
        """Render short conversations, and see in which form the text of each role comes through."""
        self.check()
        forms = {}
        for role, conversation in PROBES.items():
            found = {form: self._comes_through(role, conversation, form) for form in ("string", "parts")}
            read = [form for form, comes in found.items() if comes]
            if role == "user":
                self._loses_text = not read and False in found.values()
            forms[role] = "both" if len(read) == 2 else "".join(read)
        # Where the template rejects such a conversation, its syntax must do.
        by_syntax = "parts" if self._syntax["loops"] and not self._syntax["tests"] else "string"
        forms["user"] = forms["user"] or by_syntax
        return {role: form or ("string" if role == "tool" else forms["user"]) for role, form in forms.items()}

    def _comes_through(self, role: str, conversation: Sequence[Mapping[str, Any]], form: str) -> bool | None:
        """Tell whether a content of a form comes through.  None: the template rejects the conversation."""
        marker = f"marker{secrets.token_hex(8)}"
        messages = []
        for message in conversation:
            word = marker if message["role"] == role else "x"
            content = word if form == "string" else [{"type": "text", "text": word}]
            messages.append({**message, "content": content})
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            text: str | None = self._render({**SOME_TOKENS, **given})
        except (RequestError, CheckpointError) as error:
            if isinstance(error, CheckpointError) and not self._tried:
                raise
            text = None
        self._tried = True
        if text is None:
            return None
        # A template that takes parts for a string writes them as Python or JSON does.
        spelled = any(f"{quote}text{quote}: {quote}{marker}" in text for quote in ("'", '"'))
        return marker in text and not spelled


CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
USER = {"role": "user"}
# Conversations that show what becomes of each role's content, as short as templates take them.
PROBES: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "user": (USER,),
    "system": ({"role": "system"}, USER),
    "assistant": (USER, {"role": "assistant"}, USER),
    "tool": (
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "tool_call_id": "call00001"},
    ),
}
SOME_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message as transformers gives it to templates: without what is null, its reasoning under each name."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _cut(text: str, final: str, tag: str) -> str:
    """Cut a text where the tag is, behind the final message."""
    end = text.rfind(tag.strip())
    if end < 0 or final.strip() not in text:
        raise _no_final("the chat template leaves the final message out, or changes it")
    # A template that strips a content has taken the tag's own space, and is to take those before the tag, too.
    cut = text[:end] if text.startswith(tag, end) else text[:end].rstrip()
    # It may write the content in several places.
    return cut.replace(tag, "").replace(tag.strip(), "")


def _no_final(why: str) -> RequestError:
    return RequestError(
        f"there is no final message to continue: {why}", code="messages", tensor="continue_final_message"
    )


def check_messages(messages: Any) -> None:
    """Refuse with a RequestError what is no conversation: templates write nothing, or nonsense, of what they miss."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    whole = listed and all(
        isinstance(message, Mapping) and isinstance(message.get("role"), str) and len(message) > 1
        for message in messages
    )
    if not whole or not messages:
        raise RequestError(
            "there is no conversation in the messages",
            code="messages",
            tensor="messages",
            expected='one message at least, each {"role": ..., "content": ...}',
            found=reprlib.repr(messages),
        )
