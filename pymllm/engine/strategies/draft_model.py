"""A draft model: a second, smaller model with the same vocabulary writes ahead, and the model itself checks.

The second model's keys and values lie in pages of the same numbers as the model's own, so that they are shared, found
again, and lost together. It reads a prompt in the same pieces, right after the model. What it has not read of an
answer, while that went on without drafts, it reads before it drafts again, and so what it lacks of pages that were
taken over: a page may be of such an answer, or of a text that was only scored. Its drafts are those that it finds
likeliest. Whatever its pages hold, answers stay right, as the model checks every draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.strategies.base import Beside, StepRunner
from pymllm.engine.strategies.speculation import Speculation, weight_bytes
from pymllm.kernels.attention import PAGE_SIZE
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import Parallel

# How many tokens of an answer the second model reads at a time.
PIECE = 512


class DraftModel(Speculation):
    """The strategy.  A request's own part is the second model's request for the same text.

    model: the second model.
    """

    name = "draft_model"

    def __init__(self, drafts: int, model: LanguageModel) -> None:
        super().__init__(drafts)
        self.model, self.weight = model, 1.0
        self.known = self.vocabulary = model.config.size("vocab_size")
        self._run: StepRunner | None = None
        self._filled: dict[
            int, bytes
        ] = {}  # by page, the key of the text with which the second model has filled it

    @property
    def drafting_cost(self) -> float:
        return self.weight * self.drafts

    def open(self, model: LanguageModel, cache: PagedKVCache, parallel: Parallel, beside: Beside) -> None:
        super().open(model, cache, parallel, beside)
        # What its steps cost, of those of the model; and which of its drafts the model knows.
        self.weight = weight_bytes(self.model) / max(weight_bytes(model), 1)
        self.vocabulary = min(model.config.size("vocab_size"), self.known)
        self._run = beside(self.model)

    def begin(self, request: Request) -> None:
        super().begin(request)
        request.decoding.own = Request(request.prompt, SamplingParams(), request.limit)

    def end_run(self, request: Request) -> None:
        start = request.computed
        super().end_run(request)
        if request.is_reading:
            try:
                self._follow(request, start, request.computed)
            except Exception as error:
                if self.parallel is not None and self.parallel.size > 1:
                    raise
                request.fail(error)

    def promise(self, request: Request) -> int:
        return self.drafts if request.length + self.drafts <= self.model.max_length else 0

    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        assert self.parallel is not None and self._run is not None
        running: list[Request] = []
        for request in requests:
            own: Request = request.decoding.own
            self._follow(request, request.length - 2, request.length - 2)
            # The last two tokens: after a run whose drafts were all right it lacks both, else it reads one again, which
            # is harmless, and lets the step be replayed.
            own.computed = request.length - 2
            self._plan(request, _text(request, own.computed, request.length), [1])
            running.append(own)
        drafts: list[list[int]] = [[] for _ in requests]
        for _ in range(self.drafts):
            tokens = self._likeliest(self._run(running))
            for request, own, found, token in zip(requests, running, drafts, tokens, strict=True):
                found.append(token)
                own.computed += len(own.running_sequence)
                self._plan(request, [token], [0])
        made: list[list[int]] = self.parallel.broadcast(drafts)
        return made

    def accept(self, request: Request, chosen: Any, end_tokens: frozenset[int]) -> None:
        super().accept(request, chosen, end_tokens)
        own: Request = request.decoding.own
        # The keys of drafts that were wrong are those of other tokens.
        own.computed = min(own.computed, request.computed)
        if own.preemptions == request.preemptions:
            self._note(request, own.computed - PAGE_SIZE)

    def _follow(self, request: Request, start: int, stop: int) -> None:
        """Have the second model read a request's text up to a position.

        start: up to where the text may be in pages that were taken over, which the second model may have filled.
        """
        assert self.cache is not None
        own: Request = request.decoding.own
        if own.preemptions != request.preemptions:
            own.computed = 0
        if own.computed < start:
            size, keys = self.cache.page_size, request.keys(self.cache.page_size)
            place = own.computed // size
            while (place + 1) * size <= start and self._filled.get(request.pages[place]) == keys[place]:
                place += 1
            own.computed = max(own.computed, place * size)
        before = own.computed
        self._read(request, _text(request, before, stop))
        own.preemptions = request.preemptions
        self._note(request, before)

    def _note(self, request: Request, before: int) -> None:
        """Note the pages that the second model has filled since it had read `before` tokens of a request."""
        assert self.cache is not None
        size, read = self.cache.page_size, request.decoding.own.computed
        for place in range(max(before, 0) // size, read // size):
            self._filled[request.pages[place]] = request.keys(size)[place]

    def _read(self, request: Request, tokens: list[int]) -> None:
        """Have the second model read tokens of a text, from where it is, as far as it knows positions."""
        assert self._run is not None
        own: Request = request.decoding.own
        for first in range(0, len(tokens), PIECE):
            piece = tokens[first : first + PIECE]
            if own.computed + len(piece) > self.model.max_length:
                return
            self._plan(request, piece, [])
            self._run([own])
            own.computed += len(piece)

    def _plan(self, request: Request, tokens: Sequence[int], rows: list[int]) -> None:
        """Set the second model's next run of a request, in the pages that this has now."""
        own: Request = request.decoding.own
        own.pages, own.preemptions = request.pages, request.preemptions
        own.is_prefilling = own.computed < len(own.prompt)
        # Any token will do for one that it does not know: what is drafted then is hardly right.
        own.running_sequence = [token if token < self.known else 0 for token in tokens]
        own.rows = rows

    def _likeliest(self, logits: Tensor) -> list[int]:
        found: list[int] = logits[:, : self.vocabulary].float().cpu().numpy().argmax(-1).tolist()
        return found


def _text(request: Request, start: int, stop: int) -> list[int]:
    """Return the tokens of a request from one position to another."""
    read = len(request.prompt)
    if start >= read:
        return request.answer[start - read : max(stop - read, 0)]
    return request.prompt[start:stop] + request.answer[: max(stop - read, 0)]
