"""A checkpoint's chat template, rendered in a sandbox with a limit on time and size.

A template is code from a checkpoint: it reaches no attribute of a Python object, builds no huge string, and is stopped
after one second.
"""

from __future__ import annotations

import datetime
import json
import reprlib
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pymllm.errors import CheckpointError, RequestError

MAX_SECONDS = 1.0
MAX_CHARACTERS = 1 << 20


class _Refused(Exception):
    """The refusal of something too large or too slow that a template asked for."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise _Refused("a large power")
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            size, count = (left, right) if isinstance(right, int) else (right, left)
            if hasattr(size, "__len__") and len(size) * max(count, 0) > MAX_CHARACTERS:
                raise _Refused("a large repetition")
        result = super().call_binop(context, operator, left, right)
        if hasattr(result, "__len__") and len(result) > MAX_CHARACTERS:
            raise _Refused("a large value")
        return result


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A template, compiled once.  source: the Jinja text.  file: where it came from, for error messages."""

    def __init__(self, source: str, file: str) -> None:
        self.source, self.file = source, file
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda fmt: datetime.datetime.now().strftime(fmt)
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the chat template is not valid: {error}", code="chat-template", file=file
            ) from None

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

        Raises CheckpointError if the template takes longer than a second, writes more than a megabyte or reaches for
        what the sandbox refuses; RequestError if these are no messages, or if the template itself rejects them.
        """
        _check(messages)
        given = {
            **special_tokens,
            **variables,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else list(tools),
        }
        pieces, size = [], 0
        try:
            with _Deadline(MAX_SECONDS):
                for piece in self.template.generate(**given):
                    size += len(piece)
                    if size > MAX_CHARACTERS:
                        raise _Refused("more than a megabyte of text")
                    pieces.append(piece)
        except (
            _Refused,
            jinja2.exceptions.SecurityError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            raise CheckpointError(
                f"the chat template was stopped: {error}",
                code="chat-template-refused",
                file=self.file,
                fix="Do not use this checkpoint's template; send plain completions.",
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"the chat template rejects these messages: {error}", code="messages", tensor="messages"
            ) from None
        return "".join(pieces)


def _check(messages: Any) -> None:
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


class _Deadline:
    """A time limit that raises _Refused in this thread; a template is Python code, so each line checks the time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > self.end:
            raise _Refused("it took longer than a second")
        return self._trace
