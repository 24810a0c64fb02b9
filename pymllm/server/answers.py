"""The answers to clients: completion and chat objects of the OpenAI API, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.text.tokenizer import Tokenizer


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Count the tokens of prompts and answers; an answer's count includes the token that ended it."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answer = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs)},
    }


class _Answer:
    """The objects that answer one request, which share an id and a time.

    prefix: of the id.  kind, chunk_kind: the `object` of whole answers and of chunks.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object(self.chunk_kind, choices)

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return {**self._object(self.kind, choices), "usage": usage_of(outputs)}

    def opening(self, prompts: int) -> list[dict[str, Any]]:
        """Return the chunks that come before the first piece."""
        return []

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Return the finished answer to the prompt `index`, as an entry of `choices`."""
        raise NotImplementedError

    def delta(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        """Return one piece of the answer to the prompt `index`, as an entry of a chunk's `choices`."""
        raise NotImplementedError

    def _token(self, token_id: int) -> str:
        return (
            self.tokenizer.decode([token_id], skip_special_tokens=False) if self.tokenizer.available else ""
        )


class CompletionAnswer(_Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        super().__init__(model, tokenizer)
        # By choice: how many characters have had their log-probabilities sent.
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        return self.delta(index, output.text, output.finish_reason, output.logprobs)

    def delta(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        described = None if logprobs is None else self._describe(index, logprobs)
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": described}

    def _describe(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        tokens = [self._token(entry.token_id) for entry in logprobs]
        offsets, offset = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[index] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{self._token(token): value for token, value in entry.top} for entry in logprobs],
            "text_offset": offsets,
        }


class ChatAnswer(_Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        logprobs = self._describe(output.logprobs)
        return {
            "index": index,
            "message": message,
            "finish_reason": output.finish_reason,
            "logprobs": logprobs,
        }

    def opening(self, prompts: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            self.chunk([{"index": index, "delta": delta, "finish_reason": None, "logprobs": None}])
            for index in range(prompts)
        ]

    def delta(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        described = self._describe(logprobs)
        return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": described}

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
        text = self._token(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}
