"""What the answers of all endpoints share: usage, log-probabilities, ids."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.session import StreamPiece
from pymllm.server.refusals import error_body
from pymllm.text.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0


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


@dataclass(frozen=True)
class Event:
    """A server-sent event.

    data: an object, or a word that is sent as it is.  name: of its kind, where there are several.
    """

    data: Mapping[str, Any] | str
    name: str | None = None

    def encode(self) -> str:
        """Write the event as it goes over the wire."""
        data = self.data
        if not isinstance(data, str):
            data = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"data: {data}\n\n" if self.name is None else f"event: {self.name}\ndata: {data}\n\n"


class Answer:
    """The answer to one request: one object (`whole`), or the events of a stream.

    n: how many answers each prompt gets, one after the other.
    """

    # How the id begins.
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, n: int = 1) -> None:
        self.model, self.tokenizer, self.n = model, tokenizer, n
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the object that answers in one piece."""
        raise NotImplementedError

    def begin(self, answers: int) -> list[Event]:
        """Return the events that come before the first piece of so many answers."""
        raise NotImplementedError

    def add(self, index: int, piece: StreamPiece) -> list[Event]:
        """Return the events of one piece of the answer `index`."""
        raise NotImplementedError

    def end(self, outputs: Sequence[RequestOutput]) -> list[Event]:
        """Return the events that come after the last piece of all answers."""
        raise NotImplementedError

    def fail(self, status: int, message: str) -> list[Event]:
        """Return the events that tell of an error; no others follow."""
        return [Event(error_body(status, message))]

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
                    str(token): {
                        "logprob": json_number(value),
                        "rank": rank,
                        "decoded_token": self._token(token),
                    }
                    for token, (value, rank) in known.items()
                }
            )
        return described


@dataclass(frozen=True)
class Shown:
    """The things that an answer shows beside its text.

    usage, running_usage: whether a stream ends with a count of tokens, and whether each chunk has one.
    token_ids: whether the ids of prompts and answers come along.  names_ids: whether tokens are named token_id:7.
    prompts: the token ids of each prompt, of which these speak.
    """

    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    names_ids: bool = False
    prompts: Sequence[Sequence[int]] = ()


TEXT_ALONE = Shown()


class ChoicesAnswer(Answer):
    """An answer of OpenAI's first two endpoints, whose objects and chunks have `choices`.

    kind, chunk_kind: the `object` of whole answers and of chunks.
    """

    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, n: int = 1, shown: Shown = TEXT_ALONE) -> None:
        super().__init__(model, tokenizer, n)
        self.shown = shown
        self._counted: dict[int, int] = {}  # by answer: how many of its tokens have been streamed

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [
            self.choice(index, output, outputs[index - index % self.n])
            for index, output in enumerate(outputs)
        ]
        return {**self._object(self.kind, choices), "usage": usage_of(outputs, self.n)}

    def begin(self, answers: int) -> list[Event]:
        return [self._chunk([choice]) for choice in self.opening(answers)]

    def add(self, index: int, piece: StreamPiece) -> list[Event]:
        self._counted[index] = self._counted.get(index, 0) + len(piece.token_ids)
        return [self._chunk([choice]) for choice in self.choices_of(index, piece)]

    def end(self, outputs: Sequence[RequestOutput]) -> list[Event]:
        counted = [self._chunk([], usage_of(outputs, self.n))] if self.shown.usage else []
        return [*counted, Event("[DONE]")]

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> Event:
        if self.shown.running_usage and choices:
            usage = self._usage_so_far(choices[0]["index"])
        counts = {"usage": usage} if self.shown.usage or self.shown.running_usage else {}
        return Event({**self._object(self.chunk_kind, choices), **counts})

    def _usage_so_far(self, index: int) -> dict[str, Any]:
        prompt, answer = len(self.shown.prompts[index // self.n]), self._counted.get(index, 0)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return the entries of chunks' `choices` that come before the first piece."""
        return []

    def choices_of(self, index: int, piece: StreamPiece) -> list[dict[str, Any]]:
        """Return what a piece of the answer `index` adds to a stream, as entries of chunks' `choices`."""
        if not self._tells(piece):
            return []
        reason = piece.output.finish_reason if piece.output is not None else None
        return [self.delta(index, piece.text, reason, piece.logprobs) | self._ids(piece.token_ids)]

    def _tells(self, piece: StreamPiece) -> bool:
        """Tell whether a piece has anything for the client."""
        ids = piece.token_ids if self.shown.token_ids else ()
        return bool(piece.text or piece.output is not None or piece.logprobs or ids)

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self.shown.token_ids else {}

    def _prompt_ids(self, place: int) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.shown.prompts[place])} if self.shown.token_ids else {}

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


def json_number(logprob: float) -> float:
    """Return a number for JSON, which has no infinity; OpenAI writes so for what is impossible."""
    return max(logprob, IMPOSSIBLE)
