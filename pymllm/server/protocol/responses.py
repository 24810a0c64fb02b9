"""The request of /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from pymllm.engine.sampling import MAX_LOGPROBS
from pymllm.server.protocol.base import StrictModel, refuse
from pymllm.server.protocol.conversation import ConversationRequest, join_parts, read_object, read_part

# What names things that OpenAI's servers have stored.
STORED = ("previous_response_id", "conversation", "prompt")

# What an answer may have beside its items; those but the first are of tools and inputs that there are not here, or
# asks for reasoning in a form that can be sent back, as which it comes in any case.
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)

Status = Literal["in_progress", "completed", "incomplete"]


class _TextPart(StrictModel):
    """A text.

    annotations, logprobs, parsed: what an answer had beside it.  prompt_cache_breakpoint: what was read is kept anyway.
    """

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []
    parsed: Any = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class _Refusal(StrictModel):
    type: Literal["refusal"]
    refusal: str


class _ReasoningPart(StrictModel):
    type: Literal["summary_text", "reasoning_text"]
    text: str


class _Item(StrictModel):
    """An item of a conversation.  id, status: those of an earlier answer, which change nothing."""

    id: str | None = None
    status: Status | None = None


class _Message(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]
    phase: Literal["commentary", "final_answer"] | None = None


class _FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = None


class _FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Any]
    name: str | None = None


class _Reasoning(_Item):
    """The reasoning of an earlier answer.

    encrypted_content: it is left out, as only the server that made it can read it.
    """

    type: Literal["reasoning"]
    summary: list[Any] = []
    content: list[Any] = []
    encrypted_content: str | None = None


TEXTS: Mapping[str, type[StrictModel]] = {
    "input_text": _TextPart,
    "output_text": _TextPart,
    "refusal": _Refusal,
}
THOUGHTS: Mapping[str, type[StrictModel]] = {"reasoning_text": _ReasoningPart, "summary_text": _ReasoningPart}
ITEMS: Mapping[str, type[_Item]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "reasoning": _Reasoning,
}


class FunctionTool(StrictModel):
    """A function that the model may call.  defer_loading, async: false, as functions are known from the start."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class _NamedFunction(StrictModel):
    type: Literal["function"]
    name: str


class _Format(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class _Text(StrictModel):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class _Reasons(StrictModel):
    """The effort of thinking.  summary: the reasoning itself comes, whichever is asked for."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class ResponsesCount(ConversationRequest):
    """A conversation whose tokens are to be counted."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ConversationRequest.NEUTRAL,
        "background": (False,),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "context_management": ([],),
        "stream_options": ({}, {"include_obfuscation": False}),
        "prompt_cache_retention": ("in_memory",),
    }
    SPELLED: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "prompt": "input",
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text",
        "reasoning_effort": "reasoning",
    }

    input: str | list[Any]
    instructions: str | None = None
    text: dict[str, Any] | None = None
    tools: list[Any] = []
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        for name in STORED:
            if name in raw:
                refuse(
                    name,
                    "names what a server has stored, and this one stores nothing: send the whole conversation as input",
                    code="unsupported_parameter",
                )
        if not isinstance(raw.get("input", ""), (str, list)):
            refuse("input", "must be a text, or a list of items")
        if raw.get("input") == []:
            refuse("input", "must have an item")
        return super().prepare(raw)

    @property
    def functions(self) -> list[FunctionTool]:
        return [
            read_part({"function": FunctionTool}, tool, "tools", f"tools.{place}")
            for place, tool in enumerate(self.tools)
        ]

    @property
    def choice(self) -> str | dict[str, Any]:
        """The choice of tools as a chat has it."""
        if self.tool_choice is None:
            return "auto"
        if isinstance(self.tool_choice, str):
            if self.tool_choice not in ("none", "auto", "required"):
                refuse(
                    "tool_choice",
                    f"must be none, auto, required or a function, found {self.tool_choice[:80]!r}",
                )
            return self.tool_choice
        named = read_part({"function": _NamedFunction}, self.tool_choice, "tool_choice", "tool_choice")
        return {"type": "function", "function": {"name": named.name}}

    @property
    def form(self) -> _Format:
        """The form of the answer's text."""
        text = read_object(_Text, self.text or {}, "text", "text")
        form = read_object(_Format, text.format or {"type": "text"}, "text", "text.format")
        if form.type == "json_schema" and form.schema_ is None:
            refuse("text", "of the format json_schema needs a schema (at text.format.schema)")
        if form.type != "json_schema" and form.schema_ is not None:
            refuse("text", "has a schema where its type is json_schema (at text.format.schema)")
        return form

    @property
    def thinking(self) -> _Reasons:
        return read_object(_Reasons, self.reasoning or {}, "reasoning", "reasoning")

    def parameters_of_chat(self) -> dict[str, Any]:
        form = self.form
        asked: dict[str, Any] = {"reasoning_effort": self.thinking.effort}
        if form.type != "text":
            asked["response_format"] = {"type": form.type}
        if form.type == "json_schema":
            asked["response_format"]["json_schema"] = {"name": form.name, "schema": form.schema_}
        if self.tools:
            asked["tools"] = [_tool_of_chat(tool) for tool in self.functions]
            asked["parallel_tool_calls"] = self.parallel_tool_calls
        if self.tools or self.choice not in ("auto", "none"):
            asked["tool_choice"] = self.choice
        return asked

    def messages_of_chat(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        # An answer's items, one after the other, are one message.
        turn: dict[str, Any] | None = None
        for place, raw in enumerate(self.input):
            item = _read_item(raw, f"input.{place}")
            addition, kind = _of_assistant(item, f"input.{place}")
            if addition is None:
                messages.append(_message_of_chat(item, f"input.{place}"))
                turn = None
                continue
            if turn is None or _begins_anew(kind, turn):
                turn = {"role": "assistant"}
                messages.append(turn)
            before = turn.get(kind)
            turn[kind] = addition if before is None else before + addition
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = message.get("content", None if "tool_calls" in message else "")
        return messages


class ResponsesRequest(ResponsesCount):
    """OpenAI's request.  store: nothing is stored, whichever is asked for, and the answer says so.

    max_tool_calls: bounds calls of tools that run in the server, of which there are none.
    """

    max_output_tokens: int | None = Field(default=None, ge=1)
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include: list[str] = []
    store: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: int | None = Field(default=None, ge=1, le=2**31)

    def check(self) -> None:
        for name in self.include:
            if name not in INCLUDED:
                refuse("include", f"has {name[:80]!r}, which is not supported by this server")

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in self.include or bool(self.top_logprobs)

    def parameters_of_chat(self) -> dict[str, Any]:
        asked = {"max_tokens": self.max_output_tokens, "user": self.user}
        if self.wants_logprobs:
            asked |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return {**super().parameters_of_chat(), **asked}


def _read_item(raw: Any, place: str) -> _Item:
    """Read an item; a message may leave out its type."""
    if isinstance(raw, Mapping) and raw.get("type") is None and "role" in raw:
        raw = {**raw, "type": "message"}
    return read_part(ITEMS, raw, "input", place)


def _of_assistant(item: _Item, place: str) -> tuple[Any, str]:
    """Return what an item adds to the assistant's message, and under which name; None: it is of somebody else."""
    if isinstance(item, _Reasoning):
        given = item.content or item.summary
        parts = [read_part(THOUGHTS, part, "input", f"{place}.{at}") for at, part in enumerate(given)]
        return "\n\n".join(part.text for part in parts), "reasoning_content"  # type: ignore[attr-defined]
    if isinstance(item, _FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        return [{"id": item.call_id, "type": "function", "function": function}], "tool_calls"
    if isinstance(item, _Message) and item.role == "assistant":
        return "".join(_texts(item.content, f"{place}.content")), "content"
    return None, ""


def _begins_anew(kind: str, turn: dict[str, Any]) -> bool:
    """Tell whether an item of this kind cannot belong to the answer to which those before it belong."""
    return kind != "tool_calls" and bool({"content", "tool_calls"} & turn.keys())


def _message_of_chat(item: _Item, place: str) -> dict[str, Any]:
    if isinstance(item, _FunctionCallOutput):
        content = join_parts(_texts(item.output, f"{place}.output"))
        named = {} if item.name is None else {"name": item.name}
        return {"role": "tool", "tool_call_id": item.call_id, "content": content, **named}
    assert isinstance(item, _Message)
    return {"role": item.role, "content": join_parts(_texts(item.content, f"{place}.content"))}


def _texts(content: str | list[Any], place: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = [read_part(TEXTS, part, "input", f"{place}.{at}") for at, part in enumerate(content)]
    return [part.text if isinstance(part, _TextPart) else part.refusal for part in parts]  # type: ignore[attr-defined]


def _tool_of_chat(tool: FunctionTool) -> dict[str, Any]:
    given = tool.model_dump(exclude_none=True, exclude={"type", "defer_loading"})
    return {"type": "function", "function": given}
