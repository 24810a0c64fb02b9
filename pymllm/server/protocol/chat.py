"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from pymllm.engine.sampling import MAX_LOGPROBS
from pymllm.server.protocol.base import StrictModel, refuse
from pymllm.server.protocol.neutral import CHAT, Neutral
from pymllm.server.protocol.sampled import SampledRequest


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates take it: they know `system`, not OpenAI's later name `developer`."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": "system" if self.role == "developer" else self.role, "content": "".join(parts)}


class ChatRequest(SampledRequest):
    NEUTRAL: ClassVar[Neutral] = CHAT

    messages: list[Message] = Field(min_length=1)
    # A guess at the answer, for servers that are faster with one: it changes no answer.
    prediction: dict[str, Any] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if isinstance(raw.get("messages"), list):
            # Clients send back the messages that they were given, with null for what an answer did not have.
            raw["messages"] = [
                {key: value for key, value in message.items() if value is not None}
                if isinstance(message, dict)
                else message
                for message in raw["messages"]
            ]
            _refuse_other_parts(raw["messages"])
        return raw

    @property
    def answer_length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        if not self.logprobs and self.top_logprobs is not None:
            refuse("top_logprobs", "needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


def _refuse_other_parts(messages: list[Any]) -> None:
    """Refuse images, sounds and files in messages: models of several kinds of input run their text model alone."""
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(parts if isinstance(parts, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                refuse(
                    "messages",
                    f"may hold text alone: {kind!r} (at messages.{index}.content.{place}) is not read by this server",
                    code="unsupported_content",
                )
