"""The requests of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from pymllm.server.protocol.base import BodyRequest, Many, read_request, refuse
from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.protocol.neutral import COMMON, Neutral
from pymllm.server.protocol.sampled import TokenId

# As long as a text that a chat template writes may be: to encode more takes seconds.
MAX_CHARACTERS = MAX_TOKENS = 1 << 20

# What belongs to a conversation alone.
OF_MESSAGES = (
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)

# The values of these that a text has as well.
ASKS_NOTHING = {"add_generation_prompt": (True,), "tool_choice": ("none", "auto")}


class TokenizeRequest(BodyRequest):
    """A text or a conversation whose token ids are wanted.

    add_special_tokens: whether those that the tokenizer itself adds to a text come along; None: they do.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(raw.get("prompt", ""), str):
            refuse("prompt", "must be a text")
        if len(raw.get("prompt", "")) > MAX_CHARACTERS:
            found = len(raw["prompt"])
            refuse("prompt", f"is too long: expected at most {MAX_CHARACTERS} characters, found {found}")
        if ("prompt" in raw) == ("messages" in raw):
            refuse("prompt", "or messages is needed, and not both")
        for name in OF_MESSAGES:
            if "prompt" in raw and raw.get(name) and raw[name] not in ASKS_NOTHING.get(name, ()):
                refuse(name, "needs messages")
        if "messages" in raw and raw.get("add_special_tokens"):
            refuse("add_special_tokens", "needs a prompt: a conversation has those of its template")
        return raw

    def as_chat(self) -> ChatRequest:
        """Return the chat that has this conversation."""
        names = ("messages", *OF_MESSAGES)
        return read_request(ChatRequest, {name: getattr(self, name) for name in names})


class DetokenizeRequest(BodyRequest):
    """Token ids whose text is wanted."""

    NEUTRAL: ClassVar[Neutral] = {**COMMON, "skip_special_tokens": (False,)}

    model: str | None = None
    tokens: Many[TokenId] = Field(max_length=MAX_TOKENS)
