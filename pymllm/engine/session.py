"""Requests that come and go on one engine, and the text of their answers."""

from __future__ import annotations

from dataclasses import dataclass

from pymllm.engine.engine import Engine
from pymllm.engine.request import Request, RequestOutput, TokenLogprobs
from pymllm.engine.sampling import SamplingParams
from pymllm.text.grammars import GrammarCompiler
from pymllm.text.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class StreamPiece:
    """A step of a streamed answer.

    text: may be empty while a character is incomplete.  token_id: None in the one piece of a prompt that is only read.
    output: the whole answer, with the last piece alone.
    logprobs: None unless they were asked for.  prompt_logprobs: likewise, with the first piece alone.
    index: which of the `n` answers to its prompt it belongs to.
    """

    text: str
    token_id: int | None
    output: RequestOutput | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    index: int = 0


class Session:
    """One thread's use of an engine, from its first request to its last.

    unfinished: the requests that have not finished.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, grammars: GrammarCompiler) -> None:
        self.engine, self.tokenizer, self.grammars = engine, tokenizer, grammars
        self._texts: dict[Request, TextStream | None] = {}

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
        limit = len(prompt) + params.max_tokens if params.max_tokens is not None else self.engine.max_length
        request = Request(prompt, params, limit, adapter, req_id)
        if params.follows is not None:
            request.sampler.matcher = self.grammars.start(params.follows)
        request.sampler.bad_words = self.tokenizer.spellings(params.bad_words)
        self.engine.add(request)
        self._texts[request] = (
            TextStream(self.tokenizer, params.stop, params.min_tokens, begins=params.follows is None)
            if self.tokenizer.available
            else None
        )
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
        self._texts[request] = None
        return request

    def step(self) -> list[tuple[Request, StreamPiece | None]]:
        """Run one step of the engine.  Returns the requests that took part, with their new pieces.

        A piece is None if its request read only a part of its prompt, or failed (`Request.error`).
        """
        return [(request, self._piece(request)) for request in self.engine.step()]

    def abort(self, request: Request) -> None:
        """End a request that has not finished; its pages are free at once."""
        del self._texts[request]
        self.engine.abort(request)

    def close(self) -> None:
        """End every request that has not finished."""
        for request in self.unfinished:
            self.abort(request)

    def _piece(self, request: Request) -> StreamPiece | None:
        if request.error is not None:
            del self._texts[request]
            return None
        if not request.new_tokens:
            if request.finish_reason is None:
                return None
            # It was only to be read.
            del self._texts[request]
            return StreamPiece("", None, request.output())
        token, text = request.answer[-1], self._texts[request]
        ended_by_token = request.eos_token_generated
        piece = "" if text is None or ended_by_token else text.push(token)
        if text is not None and text.stopped and request.finish_reason is None:
            request.finish_reason = "stop"
            self.engine.scheduler.remove(request)
        logprobs = request.logprobs[-1] if request.logprobs else None
        begins = request.params.prompt_logprobs is not None and len(request.answer) == request.new_tokens
        before = tuple(request.prompt_logprobs) if begins else None
        if request.finish_reason is None:
            return StreamPiece(piece, token, logprobs=logprobs, prompt_logprobs=before)
        del self._texts[request]
        if text is not None:
            piece += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        output = request.output(text.text if text is not None else "")
        return StreamPiece(piece, token, output, logprobs, before)
