"""The answers of /v1/chat/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.session import StreamPiece
from pymllm.server.answers.base import TEXT_ALONE, ChoicesAnswer, Event, Shown, json_number
from pymllm.server.answers.conversation import Conversation
from pymllm.text.parts import Content, Part, Reasoning, ToolCall
from pymllm.text.tokenizer import Tokenizer


class ChatAnswer(ChoicesAnswer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, tokenizer: Tokenizer, n: int, conversation: Conversation, shown: Shown = TEXT_ALONE
    ) -> None:
        super().__init__(model, tokenizer, n, shown)
        self.conversation = conversation

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        answer, described = super().whole(outputs), self._describe_prompt(outputs[0])
        answer |= self._prompt_ids(0)
        return answer if described is None else {**answer, "prompt_logprobs": described}

    def choice(self, index: int, output: RequestOutput, first: RequestOutput) -> dict[str, Any]:
        parts = self.conversation.whole(output)
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.reasoning is not None:
            message["reasoning_content"] = parts.reasoning
        if parts.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in parts.calls
            ]
        reason = finish_reason(output.finish_reason, called=bool(parts.calls))
        logprobs = self._describe(output.logprobs)
        choice = {"index": index, "message": message, "finish_reason": reason, "logprobs": logprobs}
        return choice | self._ids(output.token_ids)

    def begin(self, answers: int) -> list[Event]:
        first, *others = super().begin(answers)
        assert isinstance(first.data, dict)
        return [Event({**first.data, **self._prompt_ids(0)}), *others]

    def opening(self, answers: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
            for index in range(answers)
        ]

    def choices_of(self, index: int, piece: StreamPiece) -> list[dict[str, Any]]:
        deltas = [_delta(part) for part in self.conversation.parts(index, piece)]
        # What a piece has beside its parts comes with the first of them, and the end of the answer with the last.
        if not deltas and self._tells(replace(piece, text="")):
            deltas = [{}]
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "finish_reason": None, "logprobs": None} for delta in deltas
        ]
        if choices:
            choices[0] |= {"logprobs": self._describe(piece.logprobs), **self._ids(piece.token_ids)}
        if piece.output is not None:
            called = index in self.conversation.called
            choices[-1]["finish_reason"] = finish_reason(piece.output.finish_reason, called=called)
        return choices

    def _describe(self, logprobs: Sequence[TokenLogprobs] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(token, value) for token, value in entry.top],
            }
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = list(self._bytes(token_id))
        name = f"token_id:{token_id}" if self.shown.names_ids else self._token(token_id)
        return {"token": name, "logprob": json_number(logprob), "bytes": content}


def finish_reason(reason: str | None, *, called: bool) -> str | None:
    """Return why an answer ended, as OpenAI says it; an answer that called tools waits for their results."""
    return "tool_calls" if called and reason == "stop" else reason


def _delta(part: Part) -> dict[str, Any]:
    """Return a part as a chunk's `delta`."""
    if isinstance(part, Content):
        return {"content": part.text}
    if isinstance(part, Reasoning):
        return {"reasoning_content": part.text}
    if isinstance(part, ToolCall):
        call = {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
    else:
        call = {"function": {"arguments": part.text}}
    return {"tool_calls": [{"index": part.index, **call}]}
