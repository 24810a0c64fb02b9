"""The answers of /v1/messages: blocks of content, whole or as events, as Anthropic's clients know them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import StreamPiece
from pymllm.server.answers.base import Answer, Event
from pymllm.server.answers.conversation import Conversation, count_thinking, pieces_of
from pymllm.server.anthropic_words import anthropic_error
from pymllm.server.protocol.anthropic import MessagesRequest
from pymllm.text.parts import Arguments, Content, Part, Reasoning, ToolCall
from pymllm.text.tokenizer import Tokenizer


class MessagesAnswer(Answer):
    """An answer as Anthropic's API has it: what is thought, what is said and each call are blocks.

    A call that the answer's end has cut off has as much of its input as is certain.
    """

    prefix = "msg"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        conversation: Conversation,
        request: MessagesRequest,
        params: SamplingParams,
    ) -> None:
        super().__init__(model, tokenizer)
        self.id = self.id.replace("-", "_", 1)
        self.conversation = conversation
        thinks = request.thinks
        self.shows_thinking = thinks is None or thinks.display != "omitted"
        self._begun = False
        self._blocks: list[dict[str, Any]] = []
        # The texts of the block that grows; None: none does.
        self._texts: list[str] | None = None
        self._thought: list[str] = []

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        for piece in pieces_of(output, self.tokenizer, None):
            self.add(0, piece)
        usage = self._usage(len(output.prompt_token_ids), output.cached_tokens, len(output.token_ids))
        return self._message(self._blocks, usage, **self._ending(output))

    def begin(self, answers: int) -> list[Event]:
        # The first event says how many tokens the prompt has, which is known with the first piece.
        return []

    def add(self, index: int, piece: StreamPiece) -> list[Event]:
        events = [] if self._begun else [self._start(piece)]
        for part in self.conversation.parts(index, piece):
            events += self._take(part)
        if piece.output is not None:
            if not self._blocks:
                events += self._open({"type": "text", "text": ""})
            events += self._close()
        return events

    def end(self, outputs: Sequence[RequestOutput]) -> list[Event]:
        output = outputs[0]
        usage = self._usage(len(output.prompt_token_ids), output.cached_tokens, len(output.token_ids))
        usage.pop("service_tier")
        return [
            _event("message_delta", delta=self._ending(output), usage=usage),
            _event("message_stop"),
        ]

    def fail(self, status: int, message: str) -> list[Event]:
        return [Event(anthropic_error(status, {"error": {"message": message}}), "error")]

    def _start(self, piece: StreamPiece) -> Event:
        self._begun = True
        usage = self._usage(piece.prompt_tokens, piece.cached_tokens, len(piece.token_ids))
        return _event("message_start", message=self._message([], usage, stop_reason=None, stop_sequence=None))

    def _take(self, part: Part) -> list[Event]:
        """Add a part to its block, which may be a new one.  Returns the events that tell of it."""
        if isinstance(part, ToolCall):
            block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
            return [*self._close(), *self._open(block)]
        if isinstance(part, Arguments):
            return self._grow(part.text, "input_json_delta", "partial_json")
        if isinstance(part, Reasoning):
            self._thought.append(part.text)
            opened = self._opened({"type": "thinking", "thinking": "", "signature": ""})
            grown = self._grow(part.text, "thinking_delta", "thinking")
            return [*opened, *(grown if self.shows_thinking else ())]
        assert isinstance(part, Content)
        return [*self._opened({"type": "text", "text": ""}), *self._grow(part.text, "text_delta", "text")]

    def _opened(self, block: dict[str, Any]) -> list[Event]:
        """Begin a block, unless one of its type grows."""
        if self._texts is not None and self._blocks[-1]["type"] == block["type"]:
            return []
        return [*self._close(), *self._open(block)]

    def _open(self, block: dict[str, Any]) -> list[Event]:
        event = _event("content_block_start", index=len(self._blocks), content_block=dict(block))
        self._blocks.append(block)
        self._texts = []
        return [event]

    def _grow(self, text: str, kind: str, name: str) -> list[Event]:
        assert self._texts is not None
        self._texts.append(text)
        return [self._delta({"type": kind, name: text})]

    def _delta(self, delta: dict[str, Any]) -> Event:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> list[Event]:
        """End the block that grows, if there is one."""
        if self._texts is None:
            return []
        block, text, events = self._blocks[-1], "".join(self._texts), []
        if block["type"] == "tool_use":
            block["input"] = _read_input(text)
        elif block["type"] == "thinking":
            # Clients send back only what is signed.
            signature = hashlib.sha256(text.encode()).hexdigest()
            block |= {"thinking": text if self.shows_thinking else "", "signature": signature}
            events = [self._delta({"type": "signature_delta", "signature": signature})]
        else:
            block["text"] = text
        self._texts = None
        return [*events, _event("content_block_stop", index=len(self._blocks) - 1)]

    def _ending(self, output: RequestOutput) -> dict[str, Any]:
        """Tell why the answer ended."""
        if output.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if any(block["type"] == "tool_use" for block in self._blocks):
            return {"stop_reason": "tool_use", "stop_sequence": None}
        reason = "end_turn" if output.stopped_by is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": output.stopped_by}

    def _usage(self, prompt: int, cached: int, answer: int) -> dict[str, Any]:
        """Count tokens; `input_tokens` are those of the prompt that were read now."""
        thought = count_thinking(self.tokenizer, "".join(self._thought), answer)
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": answer,
            "output_tokens_details": {"thinking_tokens": thought},
            "service_tier": "standard",
        }

    def _message(
        self, content: list[dict[str, Any]], usage: dict[str, Any], **ending: str | None
    ) -> dict[str, Any]:
        own = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return {**own, "content": content, **ending, "usage": usage}


def _event(name: str, /, **data: Any) -> Event:
    return Event({"type": name, **data}, name)


def _read_input(text: str) -> dict[str, Any]:
    """Read a call's arguments, of which the end may be missing."""
    try:
        value = from_json(text, allow_partial=True) if text.strip() else {}
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
