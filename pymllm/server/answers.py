"""The answers to clients: completion and chat objects of the OpenAI API, whole or in chunks."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pymllm.embedding.embedder import EmbeddingInput
from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.session import StreamPiece
from pymllm.text.tokenizer import Tokenizer


def usage_of(outputs: Sequence[RequestOutput], n: int = 1) -> dict[str, Any]:
    """Count the tokens of prompts and answers; an answer's count includes the token that ended it.

    n: how many answers in a row are to one prompt, which counts once.
    """
    prompt = sum(len(output.prompt_token_ids) for output in outputs[::n])
    answer = sum(len(output.token_ids) for output in outputs)
    measured = [output.metrics for output in outputs if output.metrics is not None]
    accepted = sum(metrics.accepted_tokens for metrics in measured)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs[::n])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(metrics.drafted_tokens for metrics in measured) - accepted,
        },
    }


def embedding_answer(
    model: str, vectors: Sequence[Tensor], inputs: Sequence[EmbeddingInput], encoding: str
) -> dict[str, Any]:
    """Make the answer to a request for embeddings.  encoding: "float", or "base64" of little-endian float32."""
    tokens = sum(len(one.ids) for one in inputs)
    encode = _encoded if encoding == "base64" else Tensor.tolist
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode("ascii")


IMPOSSIBLE = -9999.0


@dataclass(frozen=True)
class Echo:
    """The prompts that come before their answers: texts, token ids, and whether log-probabilities come with them."""

    texts: list[str]
    ids: list[list[int]]
    logprobs: bool


class _Answer:
    """The objects that answer one request, which share an id and a time.

    prefix: of the id.  kind, chunk_kind: the `object` of whole answers and of chunks.  n: how many answers each prompt
    gets, one after the other.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, n: int = 1) -> None:
        self.model, self.tokenizer, self.n = model, tokenizer, n
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
        choices = [
            self.choice(index, output, outputs[index - index % self.n])
            for index, output in enumerate(outputs)
        ]
        return {**self._object(self.kind, choices), "usage": usage_of(outputs, self.n)}

    def opening(self, prompts: int) -> list[dict[str, Any]]:
        """Return the chunks that come before the first piece."""
        return []

    def choices_of(self, index: int, piece: StreamPiece) -> list[dict[str, Any]]:
        """Return what a piece of the answer `index` adds to a stream, as entries of chunks' `choices`."""
        if not piece.text and piece.output is None and not piece.logprobs:
            return []
        reason = piece.output.finish_reason if piece.output is not None else None
        return [self.delta(index, piece.text, reason, piece.logprobs)]

    def choice(self, index: int, output: RequestOutput, first: RequestOutput) -> dict[str, Any]:
        """Return the finished answer `index`, as an entry of `choices`.

        first: the first answer to the same prompt, which has the prompt's log-probabilities.
        """
        raise NotImplementedError

    def delta(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        """Return one piece of the answer to the prompt `index`, as an entry of a chunk's `choices`."""
        raise NotImplementedError

    def _token(self, token_id: int) -> str:
        return self.tokenizer.token_text(token_id) if self.tokenizer.available else ""

    def _bytes(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id) if self.tokenizer.available else b""

    def _describe_prompt(self, output: RequestOutput) -> list[dict[str, Any] | None] | None:
        """Return the log-probabilities of a prompt's tokens as vLLM writes them: by token id, with text and rank.

        The rank is null for a token of the prompt that is not among the likeliest.
        """
        if output.prompt_logprobs is None:
            return None
        described: list[dict[str, Any] | None] = []
        for entry in output.prompt_logprobs:
            if entry is None:
                described.append(None)
                continue
            ranked = {token: (value, rank + 1) for rank, (token, value) in enumerate(entry.top)}
            known = {entry.token_id: (entry.logprob, None), **ranked}
            described.append(
                {
                    str(token): {"logprob": _json(value), "rank": rank, "decoded_token": self._token(token)}
                    for token, (value, rank) in known.items()
                }
            )
        return described


class CompletionAnswer(_Answer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, n: int = 1, echo: Echo | None = None) -> None:
        super().__init__(model, tokenizer, n)
        self.echo = echo
        # By choice: how many characters have had their log-probabilities sent.
        self._offsets: dict[int, int] = {}
        # By prompt: what has come of its answers before the prompt's log-probabilities.
        self._held: dict[int, list[dict[str, Any]]] = {}
        self._echoed: set[int] = set()

    def opening(self, prompts: int) -> list[dict[str, Any]]:
        if self.echo is None or self.echo.logprobs:
            return []
        return [
            self.chunk([self.delta(index, self.echo.texts[index // self.n], None, None)])
            for index in range(prompts)
        ]

    def choices_of(self, index: int, piece: StreamPiece) -> list[dict[str, Any]]:
        if self.echo is None or not self.echo.logprobs or index // self.n in self._echoed:
            return super().choices_of(index, piece)
        place, answer = divmod(index, self.n)
        if answer:
            # Its log-probabilities are described now, after those of the prompt, which are not there yet.
            self._offsets.setdefault(index, self._widths(place)[1])
            self._held.setdefault(place, []).extend(super().choices_of(index, piece))
            return []
        self._echoed.add(place)
        entries = piece.prompt_logprobs
        if entries is None and piece.output is not None:
            entries = piece.output.prompt_logprobs
        first, held = place * self.n, self._held.pop(place, [])
        echoed = [
            {"index": at, "text": self.echo.texts[place], "finish_reason": None, "logprobs": described}
            for at in range(first, first + self.n)
            if (described := self._describe_echo(at, entries or ())) is not None
        ]
        return [*echoed, *held, *super().choices_of(index, piece)]

    def choice(self, index: int, output: RequestOutput, first: RequestOutput) -> dict[str, Any]:
        if self.echo is None:
            choice = self.delta(index, output.text, output.finish_reason, output.logprobs)
            described = self._describe_prompt(first)
            return choice if described is None else {**choice, "prompt_logprobs": described}
        before = self._describe_echo(index, first.prompt_logprobs or ()) if self.echo.logprobs else None
        text = self.echo.texts[index // self.n] + output.text
        choice = self.delta(index, text, output.finish_reason, output.logprobs)
        if before is not None:
            after = choice["logprobs"] or {}
            choice["logprobs"] = {name: [*value, *after.get(name, ())] for name, value in before.items()}
        return choice

    def delta(
        self, index: int, text: str, finish_reason: str | None, logprobs: Sequence[TokenLogprobs] | None
    ) -> dict[str, Any]:
        described = None if logprobs is None else self._describe(index, logprobs)
        return {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": described}

    def _describe(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        offsets, offset = [], self._offsets.get(index, 0)
        for entry in logprobs:
            offsets.append(offset)
            offset += self._width(entry.token_id)
        self._offsets[index] = offset
        return {
            "tokens": [self._name(entry.token_id) for entry in logprobs],
            "token_logprobs": [_json(entry.logprob) for entry in logprobs],
            "top_logprobs": [self._by_name(entry.top) for entry in logprobs],
            "text_offset": offsets,
        }

    def _describe_echo(self, index: int, entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Describe the prompt of an answer; nothing is known of its first token, which nothing comes before."""
        assert self.echo is not None
        place = index // self.n
        offsets, end = self._widths(place)
        self._offsets.setdefault(index, end)
        return {
            "tokens": [self._name(token) for token in self.echo.ids[place]],
            "token_logprobs": [None if entry is None else _json(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._by_name(entry.top) for entry in entries],
            "text_offset": offsets,
        }

    def _widths(self, place: int) -> tuple[list[int], int]:
        """Return where each token of a prompt begins in its text, and where the text ends."""
        assert self.echo is not None
        text, offsets, offset = self.echo.texts[place], [], 0
        for token in self.echo.ids[place]:
            offsets.append(min(offset, len(text)))
            # Tokens that a tokenizer puts around a text, as <s>, are no part of it; nor is a space before its start.
            special = self.tokenizer.available and not self.tokenizer.decode([token])
            width = 0 if special and not self._starts(text, offset, token) else self._width(token)
            if offset == 0 and width and self._token(token).startswith(" ") and not text.startswith(" "):
                width -= 1
            offset += width
        return offsets, len(text)

    def _starts(self, text: str, offset: int, token: int) -> bool:
        return text.startswith(self._token(token), offset)

    def _width(self, token: int) -> int:
        """Count the characters that begin in a token, which may be bytes of one only."""
        return sum(byte & 0xC0 != 0x80 for byte in self._bytes(token))

    def _name(self, token_id: int) -> str:
        """Spell a token; one that is no text is spelled as OpenAI does, bytes:\\xe4."""
        token, content = self._token(token_id), self._bytes(token_id)
        if token.encode("utf-8") == content:
            return token
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _by_name(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by token; of tokens that are spelled alike, the less likely ones are token_id:N."""
        named: dict[str, float] = {}
        for token, value in top:
            name = self._name(token)
            named[f"token_id:{token}" if name in named else name] = _json(value)
        return named


class ChatAnswer(_Answer):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        answer, described = super().whole(outputs), self._describe_prompt(outputs[0])
        return answer if described is None else {**answer, "prompt_logprobs": described}

    def choice(self, index: int, output: RequestOutput, first: RequestOutput) -> dict[str, Any]:
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
        content = list(self._bytes(token_id))
        return {"token": self._token(token_id), "logprob": _json(logprob), "bytes": content}


def _json(logprob: float) -> float:
    """Return a number for JSON, which has no infinity; OpenAI writes so for what is impossible."""
    return max(logprob, IMPOSSIBLE)
