"""The messages of a conversation, as clients write them and send back what they were given."""

from __future__ import annotations

from typing import Any, Literal

from pymllm.server.protocol.base import Many, StrictModel, refuse


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(StrictModel):
    """A call of an earlier answer.

    arguments: a JSON object, as text.  parsed_arguments: accepted; OpenAI's client keeps them beside their text.
    """

    name: str
    arguments: str = ""
    parsed_arguments: Any = None


class Call(StrictModel):
    """A call of an earlier answer.  index: accepted, as accumulated streams have it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(StrictModel):
    """A message; most of its fields are those of an assistant's answer that is sent back.

    reasoning: another name of reasoning_content.  annotations, parsed: accepted; the model does not see them.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Many[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: Many[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None  # what OpenAI's client has read from the content

    def check(self, place: int) -> None:
        """Refuse fields that do not go with the role."""
        if self.role != "assistant":
            fields = ("tool_calls", "reasoning_content", "reasoning", "refusal", "annotations", "parsed")
            for field in fields:
                if getattr(self, field):
                    refuse(
                        "messages",
                        f"may have {field} where the role is assistant (at messages.{place}.{field})",
                    )
            if self.content is None:
                refuse("messages", f"must have content (at messages.{place}.content)")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            verb = "must" if self.role == "tool" else "may not"
            refuse(
                "messages",
                f"of the role {self.role} {verb} have a tool_call_id (at messages.{place}.tool_call_id)",
            )

    def for_template(self) -> dict[str, Any]:
        """Return the message for `text.conversation.for_template`, with the fields that it has."""
        message: dict[str, Any] = {
            # Templates know `system`, not OpenAI's later name `developer`.
            "role": "system" if self.role == "developer" else self.role,
            "content": self._content(),
        }
        thought = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        calls = [
            call.model_dump(exclude={"index": True, "function": {"parsed_arguments"}})
            for call in self.tool_calls or ()
        ]
        further = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": thought,
            "tool_calls": calls or None,
        }
        return message | {key: value for key, value in further.items() if value is not None}

    def _content(self) -> str | list[dict[str, str]] | None:
        if isinstance(self.content, list):
            return [{"type": "text", "text": part.text} for part in self.content]
        return self.refusal if self.content is None else self.content


def prepare_messages(messages: Any) -> Any:
    """Return messages as they are validated.  RequestError for images, sounds and files, which no model here reads."""
    if not isinstance(messages, list):
        return messages
    _refuse_other_parts(messages)
    # Clients send back the messages that they were given, with null for what an answer did not have, and add fields
    # of their own with nothing in them.
    return [
        {
            key: value
            for key, value in message.items()
            if value is not None and (key in Message.model_fields or not _is_nothing(value))
        }
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_nothing, value.values()))
    return value is None or value == []


def _refuse_other_parts(messages: list[Any]) -> None:
    """Refuse images, sounds and files in messages: models of several kinds of input run their text model alone."""
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in ("text", "refusal"):
                refuse(
                    "messages",
                    f"may hold text alone: {kind!r} (at messages.{index}.content.{place}) is not read by this server",
                    code="unsupported_content",
                )
