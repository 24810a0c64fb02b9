"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from pymllm.engine.sampling import GRAMMARS, MAX_LOGPROBS
from pymllm.errors import RequestError
from pymllm.server.protocol.base import Many, refuse
from pymllm.server.protocol.messages import Message, prepare_messages
from pymllm.server.protocol.neutral import CHAT, Neutral
from pymllm.server.protocol.sampled import GRAMMARS as GIVEN_GRAMMARS
from pymllm.server.protocol.sampled import SampledRequest
from pymllm.server.protocol.tools import Calls, Choice, FunctionTool, check_choice, choose
from pymllm.text.tool_calls.base import check_tools


class ChatRequest(SampledRequest):
    """A conversation, and what its answer may be.

    chat_template_kwargs: variables of the chat template.  documents, reasoning_effort: two of these that have a field.
    prediction: a guess at the answer, for servers that are faster with one: it changes no answer.
    """

    NEUTRAL: ClassVar[Neutral] = CHAT

    messages: Many[Message] = Field(min_length=1)
    prediction: dict[str, Any] | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Many[FunctionTool] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Many[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        check_choice(raw.get("tool_choice"))
        if "messages" in raw:
            raw["messages"] = prepare_messages(raw["messages"])
        return raw

    def check(self) -> None:
        super().check()
        for place, message in enumerate(self.messages):
            message.check(place)
        check_tools([tool.tool() for tool in self.tools or ()])
        if self.continue_final_message:
            if self.add_generation_prompt:
                refuse("continue_final_message", "and add_generation_prompt do not go together")
            if self.messages[-1].role != "assistant":
                refuse("continue_final_message", "needs a last message of the role assistant")

    def as_chat(self) -> ChatRequest:
        return self

    @property
    def calls(self) -> Calls:
        """The calls that the answer may make."""
        return choose([tool.tool() for tool in self.tools or ()], self.tool_choice, self.parallel_tool_calls)

    @property
    def begins_answer(self) -> bool:
        """Tell whether the prompt ends with what begins an answer."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def answer_length(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        if not self.logprobs and self.top_logprobs is not None:
            refuse("top_logprobs", "needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def blame(self, error: RequestError) -> RequestError:
        # The grammar is made of the tools' schemas, unless one was given.
        given = any(getattr(self, name) is not None for name in GIVEN_GRAMMARS)
        if error.code == "grammar" and error.tensor in GRAMMARS and (self.calls.forced or not given):
            error.message = "tools" + error.message.removeprefix(error.tensor)
            error.tensor = "tools"
        if error.tensor == "max_tokens" and self.max_completion_tokens is not None:
            error.message = "max_completion_tokens" + error.message.removeprefix(error.tensor)
            error.tensor = "max_completion_tokens"
        return super().blame(error)
