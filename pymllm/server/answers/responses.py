"""The answers of /v1/responses: items, whole or as events."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import StreamPiece
from pymllm.server.answers.base import Answer, Event, json_number
from pymllm.server.answers.conversation import Conversation, count_thinking, pieces_of
from pymllm.server.protocol.responses import ResponsesRequest
from pymllm.text.parts import Arguments, Content, Part, Reasoning, ToolCall
from pymllm.text.tokenizer import Tokenizer

# How the ids of items begin.
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass
class _Item:
    """An item that grows.  place: in `output`.  shown: what is known of it from the start."""

    place: int
    shown: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def part(self) -> dict[str, Any]:
        """Its content."""
        if self.shown["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def whole(self, status: str) -> dict[str, Any]:
        """Return the item as it is now."""
        grown = (
            {"arguments": self.text} if self.shown["type"] == "function_call" else {"content": [self.part]}
        )
        return {**self.shown, **grown, "status": status}


def _from_text(entries: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Leave out the tokens that come before the one in which a text begins; none, where that cannot be told."""
    spelled = [bytes(entry["bytes"]) for entry in entries]
    told, whole, begins, offset = text.encode(), b"".join(spelled), [], 0
    for part in spelled:
        begins.append(offset)
        offset += len(part)
    for place, begin in enumerate(begins):
        if whole.startswith(told, begin):
            return entries[place:]
    # The token has the end of the mark, too.
    inside = whole.rfind(told)
    return entries[max((place for place, begin in enumerate(begins) if begin <= inside), default=0) :]


class ResponsesAnswer(Answer):
    """An answer as OpenAI's newer API has it: what is thought, what is said and each call are items of their own.

    params: the settings by which the answer is made, which it states.
    """

    prefix = "resp"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        conversation: Conversation,
        request: ResponsesRequest,
        params: SamplingParams,
    ) -> None:
        super().__init__(model, tokenizer)
        self.id = self.id.replace("-", "_", 1)
        self.conversation, self.request, self.params = conversation, request, params
        self._done: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._thought: list[str] = []
        # Log-probabilities of tokens whose text is not certain yet.
        self._waiting: list[dict[str, Any]] = []
        self._number = 0

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        # Piece by piece where each text is to get the log-probabilities of its own tokens.
        pieces = pieces_of(outputs[0], self.tokenizer, self.params if self.request.wants_logprobs else None)
        for piece in pieces:
            self.add(0, piece)
        return self._finished(outputs[0])

    def begin(self, answers: int) -> list[Event]:
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
        ]

    def add(self, index: int, piece: StreamPiece) -> list[Event]:
        self._waiting += [self._describe(entry) for entry in piece.logprobs or ()]
        events = [event for part in self.conversation.parts(index, piece) for event in self._take(part)]
        if piece.output is not None:
            if self._item is None and not self._done:
                events += self._open("message")
            if self._item is not None:
                # Those of a token that ends the answer, which has no text.
                self._item.logprobs += self._waiting
            events += self._close("incomplete" if piece.output.finish_reason == "length" else "completed")
        return events

    def end(self, outputs: Sequence[RequestOutput]) -> list[Event]:
        response = self._finished(outputs[0])
        return [self._event(f"response.{response['status']}", response=response)]

    def fail(self, status: int, message: str) -> list[Event]:
        error = {"code": "server_error" if status >= 500 else "invalid_prompt", "message": message}
        unfinished = [] if self._item is None else [self._item.whole("incomplete")]
        output = [*self._done, *unfinished]
        return [self._event("response.failed", response=self._response("failed", output=output, error=error))]

    def _take(self, part: Part) -> list[Event]:
        """Add a part to its item, which may be a new one.  Returns the events that tell of it."""
        if isinstance(part, ToolCall):
            self._waiting.clear()
            return [
                *self._close("completed"),
                *self._open("function_call", call_id=part.id, name=part.name, arguments=""),
            ]
        if isinstance(part, Arguments):
            return self._grow("function_call", part.text, "response.function_call_arguments.delta")
        if isinstance(part, Reasoning):
            self._thought.append(part.text)
            return self._grow("reasoning", part.text, "response.reasoning_text.delta", content_index=0)
        assert isinstance(part, Content)
        return self._grow("message", part.text, "response.output_text.delta", content_index=0)

    def _grow(self, kind: str, text: str, name: str, **where: int) -> list[Event]:
        events = []
        if self._item is None or self._item.shown["type"] != kind:
            events = [*self._close("completed"), *self._open(kind)]
            # A mark before it, which ends thoughts or a call, has tokens of its own.
            self._waiting = _from_text(self._waiting, text)
        assert self._item is not None
        self._item.texts.append(text)
        extra: dict[str, Any] = {}
        if kind == "message":
            extra["logprobs"] = list(self._waiting)
            self._item.logprobs += self._waiting
        self._waiting.clear()
        return [*events, self._of_item(name, **where, delta=text, **extra)]

    def _open(self, kind: str, **shown: Any) -> list[Event]:
        """Begin an item."""
        name = f"{PREFIXES[kind]}_{uuid.uuid4().hex}"
        shown = {"id": name, "type": kind, "status": "in_progress", **shown}
        if kind == "message":
            shown |= {"role": "assistant", "content": []}
        if kind == "reasoning":
            shown |= {"summary": [], "content": []}
        self._item = item = _Item(len(self._done), shown)
        added = self._event("response.output_item.added", output_index=item.place, item=shown)
        if kind == "function_call":
            return [added]
        return [added, self._of_item("response.content_part.added", content_index=0, part=item.part)]

    def _close(self, status: str) -> list[Event]:
        """End the item that grows, if there is one."""
        item = self._item
        if item is None:
            return []
        kind, text = item.shown["type"], item.text
        if kind == "function_call":
            name = item.shown["name"]
            events = [self._of_item("response.function_call_arguments.done", name=name, arguments=text)]
        elif kind == "reasoning":
            events = [self._of_item("response.reasoning_text.done", content_index=0, text=text)]
        else:
            events = [
                self._of_item("response.output_text.done", content_index=0, text=text, logprobs=item.logprobs)
            ]
        if kind != "function_call":
            events.append(self._of_item("response.content_part.done", content_index=0, part=item.part))
        whole = item.whole(status)
        self._done.append(whole)
        self._item = None
        return [*events, self._event("response.output_item.done", output_index=item.place, item=whole)]

    def _event(self, name: str, /, **data: Any) -> Event:
        event = Event({"type": name, "sequence_number": self._number, **data}, name)
        self._number += 1
        return event

    def _of_item(self, name: str, /, **data: Any) -> Event:
        assert self._item is not None
        where = {"item_id": self._item.shown["id"], "output_index": self._item.place}
        return self._event(name, **where, **data)

    def _describe(self, entry: TokenLogprobs) -> dict[str, Any]:
        return {
            **self._entry(entry.token_id, entry.logprob),
            "top_logprobs": [self._entry(token, value) for token, value in entry.top],
        }

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._token(token), "logprob": json_number(value), "bytes": list(self._bytes(token))}

    def _finished(self, output: RequestOutput) -> dict[str, Any]:
        """Return the whole answer."""
        complete = output.finish_reason != "length"
        prompt, answer = len(output.prompt_token_ids), len(output.token_ids)
        thought = count_thinking(self.tokenizer, "".join(self._thought), answer)
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": output.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + answer,
        }
        return self._response(
            "completed" if complete else "incomplete",
            output=self._done,
            usage=usage,
            incomplete_details=None if complete else {"reason": "max_output_tokens"},
        )

    def _response(self, status: str, **known: Any) -> dict[str, Any]:
        request, params = self.request, self.params
        thinking = request.thinking
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": thinking.effort, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": params.temperature,
            "text": {
                "format": request.form.model_dump(exclude_none=True, by_alias=True),
                "verbosity": "medium",
            },
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump(exclude={"defer_loading"}) for tool in request.functions],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
            **known,
        }
