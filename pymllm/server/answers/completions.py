"""The answers of /v1/completions, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pymllm.engine.request import RequestOutput, TokenLogprobs
from pymllm.engine.session import StreamPiece
from pymllm.server.answers.base import TEXT_ALONE, ChoicesAnswer, Shown, json_number
from pymllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Echo:
    """The prompts that come before their answers: texts, token ids, and whether log-probabilities come with them."""

    texts: list[str]
    ids: list[list[int]]
    logprobs: bool


class CompletionAnswer(ChoicesAnswer):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        n: int = 1,
        echo: Echo | None = None,
        shown: Shown = TEXT_ALONE,
    ) -> None:
        super().__init__(model, tokenizer, n, shown)
        self.echo = echo
        # By choice: how many characters have had their log-probabilities sent.
        self._offsets: dict[int, int] = {}
        # By prompt: what has come of its answers before the prompt's log-probabilities.
        self._held: dict[int, list[dict[str, Any]]] = {}
        self._echoed: set[int] = set()

    def opening(self, answers: int) -> list[dict[str, Any]]:
        if self.shown.token_ids:
            return [
                self.delta(index, self._echoed_text(index), None, None) | self._prompt_ids(index // self.n)
                for index in range(answers)
            ]
        if self.echo is None or self.echo.logprobs:
            return []
        return [self.delta(index, self._echoed_text(index), None, None) for index in range(answers)]

    def _echoed_text(self, index: int) -> str:
        """Return what comes before an answer at once; log-probabilities of a prompt come with its text, later."""
        return "" if self.echo is None or self.echo.logprobs else self.echo.texts[index // self.n]

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
        ids = {**self._prompt_ids(index // self.n), **self._ids(output.token_ids)}
        if self.echo is None:
            choice = self.delta(index, output.text, output.finish_reason, output.logprobs) | ids
            described = self._describe_prompt(first)
            return choice if described is None else {**choice, "prompt_logprobs": described}
        before = self._describe_echo(index, first.prompt_logprobs or ()) if self.echo.logprobs else None
        text = self.echo.texts[index // self.n] + output.text
        choice = self.delta(index, text, output.finish_reason, output.logprobs) | ids
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
            "token_logprobs": [json_number(entry.logprob) for entry in logprobs],
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
            "token_logprobs": [None if entry is None else json_number(entry.logprob) for entry in entries],
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
        if self.shown.names_ids:
            return f"token_id:{token_id}"
        token, content = self._token(token_id), self._bytes(token_id)
        if token.encode("utf-8") == content:
            return token
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _by_name(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log-probabilities by token; of tokens that are spelled alike, the less likely ones are token_id:N."""
        named: dict[str, float] = {}
        for token, value in top:
            name = self._name(token)
            named[f"token_id:{token}" if name in named else name] = json_number(value)
        return named
