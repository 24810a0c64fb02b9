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

    text: may be empty while a character is incomplete.  output: the whole answer, with the last piece alone.
    logprobs: None unless they were asked for.
    """

    text: str
    token_id: int
    output: RequestOutput | None = None
    logprobs: TokenLogprobs | None = None


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
        self, prompt: list[int], params: SamplingParams, adapter: str | None = None, req_id: int = 0
    ) -> Request:
        """Queue a prompt.  RequestError if it can never run.  req_id: the caller's own number for it."""
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
            return None
        token, text = request.answer[-1], self._texts[request]
        ended_by_token = request.eos_token_generated
        piece = "" if text is None or ended_by_token else text.push(token)
        if text is not None and text.stopped and request.finish_reason is None:
            request.finish_reason = "stop"
            self.engine.scheduler.remove(request)
        logprobs = request.logprobs[-1] if request.logprobs else None
        if request.finish_reason is None:
            return StreamPiece(piece, token, logprobs=logprobs)
        del self._texts[request]
        if text is not None:
            piece += text.finish()
            if text.stopped:
                request.finish_reason = "stop"
        return StreamPiece(piece, token, request.output(text.text if text is not None else ""), logprobs)
