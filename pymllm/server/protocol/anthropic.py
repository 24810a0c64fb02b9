"""The requests of /v1/messages and /v1/messages/count_tokens, as Anthropic's clients send them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from pymllm.errors import RequestError
from pymllm.server.protocol.base import Many, StrictModel, refuse
from pymllm.server.protocol.conversation import (
    ConversationRequest,
    drop_nulls,
    join_parts,
    read_object,
    read_part,
)

# Anthropic's names of what a chat calls `tool_choice`.
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class _Block(StrictModel):
    """A block of a message.  cache_control: what was read is kept in any case (docs/serving.md)."""

    cache_control: dict[str, Any] | None = None


class _Text(_Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None
    parsed_output: Any = None


class _Thinking(_Block):
    """The thoughts before an earlier answer.  signature: it is taken as it is."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class _RedactedThinking(_Block):
    """Thoughts that only the server which had them can read: they are left out."""

    type: Literal["redacted_thinking"]
    data: str


class _ToolUse(_Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class _ToolResult(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] = ""
    is_error: bool = False


TEXTS: Mapping[str, type[_Block]] = {"text": _Text}
OF_USER: Mapping[str, type[_Block]] = {"text": _Text, "tool_result": _ToolResult}
OF_ASSISTANT: Mapping[str, type[_Block]] = {
    "text": _Text,
    "thinking": _Thinking,
    "redacted_thinking": _RedactedThinking,
    "tool_use": _ToolUse,
}


class _Message(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[Any]


class _Tool(_Block):
    """A tool that the client runs.  input_schema: of the object that it takes.

    eager_input_streaming: arguments come as they are made, whichever is asked for.
    """

    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    defer_loading: Literal[False] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: Many[Literal["direct"]] | None = None


class _Choice(StrictModel):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _ThinkingConfig(StrictModel):
    """The mode of thinking.

    budget_tokens: a hint, as `max_tokens` bounds the answer with what is thought before it.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class _Format(StrictModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class _OutputConfig(StrictModel):
    effort: str | None = None
    format: dict[str, Any] | None = None


class _Metadata(StrictModel):
    user_id: str | None = None


class MessagesCount(ConversationRequest):
    """A conversation whose tokens are to be counted."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ConversationRequest.NEUTRAL,
        "service_tier": ("auto", "standard_only"),
        "speed": ("standard",),
        "mcp_servers": ([],),
        "betas": ([],),
        "context_management": (
            {},
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        ),
    }
    SPELLED: ClassVar[Mapping[str, str]] = {
        "prompt": "messages",
        "stop": "stop_sequences",
        "response_format": "output_config",
        "reasoning_effort": "output_config",
    }

    USUAL_EFFORT: ClassVar[str] = "high"

    messages: list[Any] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[Any] = []
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    def check(self) -> None:
        _ = self.thinks  # what the template does not read is to be right, too

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if "thread" in raw:
            # Clients that know this code send the whole conversation then.
            refuse(
                "thread",
                "names a conversation that a server keeps, and this one keeps none: send all messages",
                code="thread_unsupported_request",
            )
        return super().prepare(raw)

    @property
    def thinks(self) -> _ThinkingConfig | None:
        """The mode of thinking that is asked for; None: as the template has it."""
        if self.thinking is None:
            return None
        return read_object(_ThinkingConfig, self.thinking, "thinking", "thinking")

    def blame(self, error: RequestError) -> RequestError:
        if error.tensor == "response_format" and self.output_format is not None:
            error.message = "output_format" + error.message.removeprefix(error.tensor)
            error.tensor = "output_format"
        return super().blame(error)

    @property
    def wants_thoughts(self) -> bool | None:
        thinks = self.thinks
        return None if thinks is None else thinks.type != "disabled"

    def parameters_of_chat(self) -> dict[str, Any]:
        output = read_object(_OutputConfig, self.output_config or {}, "output_config", "output_config")
        given, name = self.output_format, "output_format"
        if given is None:
            given, name = output.format, "output_config"
        elif output.format is not None:
            refuse("output_format", "and the format of output_config ask for the same: send one of them")
        asked: dict[str, Any] = {"reasoning_effort": output.effort}
        if given is not None:
            schema = read_object(_Format, given, name, name).schema_
            asked["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
        if self._is_begun():
            asked |= {"add_generation_prompt": False, "continue_final_message": True}
        return {**asked, **self._tools_of_chat()}

    def _tools_of_chat(self) -> dict[str, Any]:
        tools = [_tool_of_chat(tool, place) for place, tool in enumerate(self.tools)]
        if self.tool_choice is None:
            return {"tools": tools} if tools else {}
        choice = read_object(_Choice, self.tool_choice, "tool_choice", "tool_choice")
        if choice.type == "tool":
            if choice.name is None:
                refuse("tool_choice", "of the type tool needs a name")
            chosen: Any = {"type": "function", "function": {"name": choice.name}}
        elif choice.name is not None:
            refuse("tool_choice", "has a name where its type is tool")
        else:
            chosen = CHOICES[choice.type]
        if not tools:
            return {} if chosen in ("auto", "none") else {"tool_choice": chosen}
        parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
        return {"tools": tools, "tool_choice": chosen, "parallel_tool_calls": parallel}

    def _is_begun(self) -> bool:
        """Tell whether the last message is the assistant's: the answer goes on with it."""
        messages = self.messages_of_chat()
        return bool(messages) and messages[-1]["role"] == "assistant"

    def messages_of_chat(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.system is not None:
            messages.append(
                {"role": "system", "content": join_parts(_texts(self.system, "system", "system"))}
            )
        for place, raw in enumerate(self.messages):
            message = read_object(_Message, raw, "messages", f"messages.{place}")
            where = f"messages.{place}.content"
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
            elif message.role == "system":
                messages.append(
                    {"role": "system", "content": join_parts(_texts(message.content, "messages", where))}
                )
            elif message.role == "user":
                messages += _of_user(message.content, where)
            else:
                messages.append(_of_assistant(message.content, where))
        last = messages[-1]
        if last["role"] == "assistant":
            if "tool_calls" in last:
                refuse("messages", "must go on with the results of the tools that the last one calls")
            if not last["content"] and "reasoning_content" not in last:
                # There is nothing to go on with.
                messages.pop()
        return messages


class MessagesRequest(MessagesCount):
    """Anthropic's request.  metadata: whose it is, which changes nothing."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Many[str] | None = None
    top_k: Any = None
    metadata: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        read_object(_Metadata, self.metadata or {}, "metadata", "metadata")

    def parameters_of_chat(self) -> dict[str, Any]:
        asked = {"max_tokens": self.max_tokens, "stop": self.stop_sequences or None, "top_k": self.top_k}
        return {**super().parameters_of_chat(), **asked}


def _of_user(blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """Return a user's message as a chat has it: the results of tools, each a message, and what is said between them."""
    messages: list[dict[str, Any]] = []
    said: list[str] = []

    def close() -> None:
        if said:
            messages.append({"role": "user", "content": join_parts(list(said))})
            said.clear()

    for at, raw in enumerate(blocks):
        block = read_part(OF_USER, raw, "messages", f"{place}.{at}")
        if isinstance(block, _Text):
            said.append(block.text)
            continue
        assert isinstance(block, _ToolResult)
        close()
        texts = _texts(block.content, "messages", f"{place}.{at}.content")
        if block.is_error:
            # A chat has no other place for it.
            texts = ["\n".join(("Error:", *texts))]
        messages.append(
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": join_parts(texts)},
        )
    close()
    return messages or [{"role": "user", "content": ""}]


def _of_assistant(blocks: list[Any], place: str) -> dict[str, Any]:
    """Return an earlier answer as a chat has it."""
    read = [read_part(OF_ASSISTANT, raw, "messages", f"{place}.{at}") for at, raw in enumerate(blocks)]
    said = [block.text for block in read if isinstance(block, _Text)]
    thought = "".join(block.thinking for block in read if isinstance(block, _Thinking))
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
        }
        for block in read
        if isinstance(block, _ToolUse)
    ]
    message = {"role": "assistant", "content": None if calls and not said else "".join(said)}
    return {**message, **drop_nulls({"reasoning_content": thought or None, "tool_calls": calls or None})}


def _texts(content: str | list[Any], param: str, place: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = [read_part(TEXTS, part, param, f"{place}.{at}") for at, part in enumerate(content)]
    return [part.text for part in parts if isinstance(part, _Text)]


def _tool_of_chat(raw: Any, place: int) -> dict[str, Any]:
    where = f"tools.{place}"
    if isinstance(raw, Mapping) and raw.get("type") is None:
        raw = {**raw, "type": "custom"}
    tool = read_part({"custom": _Tool}, raw, "tools", where)
    function = {"description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {"name": tool.name, **drop_nulls(function)}}
