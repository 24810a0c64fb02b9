"""Requests that come and go on one engine, and the text of their answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pymllm.engine.asking import Asked
from pymllm.engine.engine import Engine
from pymllm.engine.outputs import GenerationOutputs
from pymllm.engine.request import Request, RequestOutput, TokenLogprobs
from pymllm.engine.sampling import SamplingParams
from pymllm.text.grammars import GrammarCompiler
from pymllm.text.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class StreamPiece:
    """A step of a streamed answer.

    text: may be empty while a character is incomplete.  token_ids: those that have become final, in order; a step may
    give several, and a prompt that is only read has none.  output: the whole answer, with the last piece alone.
    logprobs: one of each token; None unless they were asked for.  prompt_logprobs: likewise, with the first piece
    alone.  index: which of the `n` answers to its prompt it belongs to.  prompt_tokens: how many the prompt has.
    cached_tokens: how many of these were not read, as pages of the KV cache held them already.
    """

    text: str
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    index: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def token_id(self) -> int | None:
        """The last of the tokens; None: there are none."""
        return self.token_ids[-1] if self.token_ids else None


def begin_text(tokenizer: Tokenizer, params: SamplingParams) -> TextStream:
    """Begin the text of an answer that is made by these settings."""
    return TextStream(
        tokenizer,
        params.stop,
        params.min_tokens,
        begins=params.follows is None,
        special=not params.skip_special_tokens,
        kept=params.kept_tokens,
        with_stop=params.include_stop_str_in_output,
    )


class Session:
    """One thread's use of an engine, from its first request to its last.

    unfinished: the requests that have not finished.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
        self.engine, self.tokenizer, self.grammars = engine, tokenizer, grammars
        self._texts: dict[Request, TextStream | None] = {}
        self._sent: dict[Request, int] = {}  # how many tokens of each answer pieces have had

    @property
    def unfinished(self) -> list[Request]:
        return list(self._texts)

    def add(
        self,
        prompt: list[int],
        params: SamplingParams,
        adapter: str | None = None,
        req_id: int = 0,
        *,
        first_scored: int | None = None,
    ) -> Request:
        """Queue a prompt.  RequestError if it can never run.

        req_id: the caller's own number for it.  first_scored: the prompt is only read, and its tokens from this one on
        are scored (`prompt_logprobs`); None: it is answered.
        """
        if first_scored is not None:
            return self._score(prompt, params, adapter, req_id, first_scored)
        self.engine.strategy.check(params)
        limit = len(prompt) + params.max_tokens if params.max_tokens is not None else self.engine.max_length
        request = Request(prompt, params, limit, adapter, req_id)
        if params.follows is not None:
            request.sampler.matcher = self.grammars.start(params.follows)
        request.sampler.bad_words = self.tokenizer.spellings(params.bad_words)
        self.engine.add(request)
        self._sent[request] = 0
        self._texts[request] = begin_text(self.tokenizer, params) if self.tokenizer.available else None
        return request

    def _score(
        self, prompt: list[int], params: SamplingParams, adapter: str | None, req_id: int, first_scored: int
    ) -> Request:
        # The last token is scored, but need not run, unless there is no other.
        run = max(len(prompt) - 1, 1)
        request = Request(prompt[:run], params, run, adapter, req_id)
        request.reads_only, request.first_scored = True, first_scored
        request.following = tuple(prompt[run:])
        self.engine.add(request)
        self._texts[request], self._sent[request] = None, 0
        return request

    def step(self) -> list[tuple[Request, StreamPiece | None]]:
        """Run one step of the engine.  Returns the requests that took part, with their new pieces.

        A piece is None if its request has no new tokens that are final, or failed (`Request.error`).
        """
        return [(request, self._piece(request)) for request in self.engine.step()]

    def run(
        self, asked: Sequence[Asked], outputs: GenerationOutputs | None = None
    ) -> Iterator[tuple[int, StreamPiece]]:
        """Run requests to their end, one piece a token, each with the place of its prompt.

        outputs: where the steps are recorded; None: nowhere.
        """
        for number, one in enumerate(asked):
            self.add(one.ids, one.params, one.adapter, number)
        while self.unfinished:
            started = time.perf_counter()
            stepped = self.step()
            if outputs is not None:
                outputs.record_step([request for request, _ in stepped], time.perf_counter() - started)
            for request, piece in stepped:
                if request.error is not None:
                    raise request.error
                one = asked[request.req_id]
                if piece is not None:
                    yield one.place, replace(piece, index=one.index) if one.index else piece

    def abort(self, request: Request) -> None:
        """End a request that has not finished; its pages are free at once."""
        self._forget(request)
        self.engine.abort(request)

    def close(self) -> None:
        """End every request that has not finished."""
        for request in self.unfinished:
            self.abort(request)

    def _piece(self, request: Request) -> StreamPiece | None:
        if request.error is not None:
            self._forget(request)
            return None
        first, text = self._sent[request], self._texts[request]
        if len(request.answer) == first and request.finish_reason is None:
            return None
        piece = ""
        if text is not None:
            for count, token in enumerate(request.answer[first:], first + 1):
                ended = request.eos_token_generated and not request.params.include_stop_str_in_output
                if count < len(request.answer) or not ended:
                    piece += text.push(token)
                if text.stopped:
                    self._end_at(request, count)
                    break
        self._sent[request] = len(request.answer)
        tokens = tuple(request.answer[first:])
        logprobs = None if request.params.logprobs is None else tuple(request.logprobs[first:])
        counts = {
            "prompt_tokens": len(request.prompt) + len(request.following),
            "cached_tokens": request.cached_tokens,
        }
        before = None if first or request.params.prompt_logprobs is None else tuple(request.prompt_logprobs)
        if request.finish_reason is None:
            return StreamPiece(piece, tokens, None, logprobs, before, **counts)
        self._forget(request)
        if text is not None:
            piece += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        output = request.output() if text is None else request.output(text.text, text.stopped_by)
        return StreamPiece(piece, tokens, output, logprobs, before, **counts)

    def _end_at(self, request: Request, count: int) -> None:
        """End a request at a stop string, which its first `count` tokens have completed; drop what comes after."""
        dropped = len(request.answer) - count
        # Drafts that are not part of the answer were of no use.
        request.accepted -= max(request.new_accepted - (request.new_tokens - dropped), 0)
        del request.answer[count:], request.logprobs[count:]
        if dropped:
            request.eos_token_generated = False
        if request.finish_reason is None or dropped:
            request.finish_reason = "stop"
        self.engine.scheduler.remove(request)

    def _forget(self, request: Request) -> None:
        del self._texts[request], self._sent[request]
