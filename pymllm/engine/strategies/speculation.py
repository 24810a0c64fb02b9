"""Speculation: a step runs the last token and drafts of what may follow, and keeps the drafts that are chosen anyway.

The logits after each token of a run say what comes next if all before it is right. A token is chosen at every one, by
the request's own settings for that place of its answer, with the random number of that place. A draft that equals the
token chosen before it is right, so what is chosen after it counts; the first token that differs is the last. The answer
is thus token for token that of autoregressive decoding, sampled or not, as far as kernels give a row the same logits
whatever runs beside it.

All requests of a step run equally many tokens, the last token alone or that and `drafts` more, so that the step can be
replayed: short drafts are filled up with tokens that nobody looks at. Rows cost time, so a batch drafts only while the
tokens that it may expect to gain are worth it. That follows from counts alone, and so is the same on all ranks.
"""

# R requests, N rows of logits, V vocabulary

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pymllm.engine.choosing import choose
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.engine.strategies.autoregressive import Autoregressive
from pymllm.engine.strategies.base import Beside, why_none
from pymllm.kernels.sampling import SamplingKernel
from pymllm.layers.held import weight_holders
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import Parallel

# What a further row costs of what a step of one row costs: measured on a CPU by benchmarks/speculation.py, with a model
# of 135 million weights in 4 bits, straight from 1 to 64 rows, and with one that lives in the processor's caches. A
# GPU's memory is the limit for far longer.
ROW_COST, ROW_COST_IN_CACHE, ROW_COST_ON_GPU = 0.15, 0.4, 0.01
# Up to how many bytes weights are taken to stay in the caches from step to step.
CACHED_BYTES = 16 << 20
# How much more drafts must be expected to gain than they cost: what is gained little is not worth being wrong.
MARGIN = 1.1

# How likely a request's first draft is taken to be right, and as the result of how many drafts that counts.
PRIOR, PRIOR_DRAFTS = 0.8, 6.0
# How much less a run's drafts count at the next run's; and how fast what was not tried is forgotten.
DECAY, FORGETTING = 0.9, 0.98


@dataclass
class Acceptance:
    """The share of a request's drafts that were right, in which later ones count more."""

    right: float = PRIOR * PRIOR_DRAFTS
    tried: float = PRIOR_DRAFTS

    @property
    def rate(self) -> float:
        return self.right / self.tried

    def note(self, drafts: int, right: int) -> None:
        """Take in a run.  What comes after the first wrong draft says nothing."""
        self.right = self.right * DECAY + right
        self.tried = self.tried * DECAY + min(right + 1, drafts)

    def forget(self) -> None:
        """Move a little towards what is taken of a request that never drafted, so that it drafts again some day."""
        self.right = self.right * FORGETTING + PRIOR * PRIOR_DRAFTS * (1 - FORGETTING)
        self.tried = self.tried * FORGETTING + PRIOR_DRAFTS * (1 - FORGETTING)

    def expect(self, drafts: int) -> float:
        """Return how many of so many drafts are likely to be right."""
        rate = self.rate
        return sum(rate ** (place + 1) for place in range(drafts))


@dataclass
class Speculated:
    """The state that speculation keeps of a request.

    promised: how many drafts it may get in the next step.  drafts: these.  reach: how many tokens after the last one
    the next run has, those that fill it up included.  running: that of the latest run.
    masks: what its grammar allows after the last token and after the drafts; [] without a grammar.
    own: what the strategy itself keeps.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    promised: int = 0
    drafts: list[int] = field(default_factory=list)
    reach: int = 0
    running: int = 0
    masks: list[Tensor] = field(default_factory=list)
    own: Any = None

    def drop(self) -> None:
        """Clear what was drafted."""
        self.reach, self.drafts, self.masks = 0, [], []


class Speculation(Autoregressive):
    """The base of strategies that draft.  drafts: how many tokens at most."""

    def __init__(self, drafts: int) -> None:
        self.drafts = drafts
        self.row_cost = ROW_COST
        self.cache: PagedKVCache | None = None
        self.parallel: Parallel | None = None

    @abstractmethod
    def promise(self, request: Request) -> int:
        """Return how many tokens can be drafted after a request's last one, at most `drafts`."""

    @abstractmethod
    def propose(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return drafts for each of these requests, as many as was promised or fewer; the same when asked again."""

    @property
    def drafting_cost(self) -> float:
        """The time that drafting takes, of that of a step without drafts."""
        return 0.0

    def open(self, model: LanguageModel, cache: PagedKVCache, parallel: Parallel, beside: Beside) -> None:
        self.cache, self.parallel = cache, parallel
        if next(model.parameters()).device.type != "cpu":
            self.row_cost = ROW_COST_ON_GPU
        else:
            self.row_cost = ROW_COST if weight_bytes(model) > CACHED_BYTES else ROW_COST_IN_CACHE

    def begin(self, request: Request) -> None:
        request.decoding = Speculated()

    def reach(self, request: Request) -> int:
        return request.length + (request.decoding.reach if request.missing <= 1 else 0)

    def look_ahead(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.decoding.drop()
            request.decoding.promised = self.drafts
        if not requests or not self._fits(requests):
            return
        # Where not even a draft for everyone would pay, nobody looks for one.
        pays = self._pays(requests)
        for request in requests if pays else ():
            reads = request.computed < len(request.prompt)
            request.decoding.promised = 0 if reads else self.promise(request)
        pays = pays and self._pays(requests)
        for request in requests:
            own: Speculated = request.decoding
            own.reach = self.drafts if pays else 0
            if own.promised and not pays:
                own.acceptance.forget()

    def draft(self, requests: Sequence[Request]) -> None:
        self._draft([r for r in requests if r.decoding.reach and r.decoding.promised])
        if not any(request.decoding.drafts for request in requests):
            for request in requests:
                request.decoding.drop()

    def _draft(self, requests: Sequence[Request]) -> None:
        """Give these requests their drafts.

        If that fails for several together, each is tried alone, so that only the one to blame fails.
        """
        try:
            for request, drafts in zip(requests, self.propose(requests) if requests else [], strict=True):
                own, matcher = request.decoding, request.sampler.matcher
                if matcher is not None:
                    own.masks = matcher.look_ahead(drafts)
                    drafts = drafts[: max(len(own.masks) - 1, 0)]
                own.drafts = drafts
        except Exception as error:
            if self.parallel is not None and self.parallel.size > 1:
                # Other ranks may not have failed.
                raise
            if len(requests) == 1:
                requests[0].fail(error)
            for request in requests if len(requests) > 1 else ():
                self._draft([request])

    def plan_run(self, request: Request, budget: int) -> int:
        own: Speculated = request.decoding
        own.running = own.reach
        # A request that lost its pages may find all of them but the one for its drafts.
        there = len(request.pages) * self.cache.page_size if self.cache is not None else 0
        reads = request.missing > 1 or request.computed < len(request.prompt)
        if reads or not own.running or request.length + own.running > there:
            own.drop()
            own.running = 0
            return super().plan_run(request, budget)
        request.start_step(1)
        fill = (own.drafts or request.running_sequence)[-1:]
        request.running_sequence += own.drafts + fill * (own.running - len(own.drafts))
        request.rows, request.is_reading = list(range(len(own.drafts) + 1)), False
        own.reach = 0
        return 1 + own.running

    def end_run(self, request: Request) -> None:
        # Which drafts are final is not known yet.
        request.computed += len(request.running_sequence) - request.decoding.running

    def choose(self, requests: Sequence[Request], logits: Tensor, kernel: SamplingKernel) -> list[Any]:
        if not any(request.decoding.drafts for request in requests):
            return [[entry] for entry in super().choose(requests, logits, kernel)]
        rows = [(request, count) for request in requests for count in range(len(request.rows))]
        masks = {
            row: request.decoding.masks[count]
            for row, (request, count) in enumerate(rows)
            if count < len(request.decoding.masks)
        }
        entries: list[Any] = choose(
            logits,
            [request.sampler for request, _ in rows],
            [request.answer for request, _ in rows],
            kernel,
            [request.decoding.drafts[:count] for request, count in rows],
            masks,
        )
        for row, (request, _) in enumerate(rows):
            if entries[row][0] is None:
                entries[row] = (None, why_none(request, logits[row]))
        found = iter(entries)
        return [[next(found) for _ in request.rows] for request in requests]

    def accept(self, request: Request, chosen: Any, end_tokens: frozenset[int]) -> None:
        own: Speculated = request.decoding
        drafts, right = own.drafts, 0
        own.drop()
        for entry, draft in zip(chosen, [*drafts, None], strict=True):
            if entry[0] is None and right:
                # What came before may end the answer by its text. If it does not, the next step, which runs the last
                # token again, finds the same.
                request.computed -= 1
                break
            super().accept(request, entry, end_tokens)
            if entry[0] is None or entry[0] != draft:
                break
            right += 1
            if request.finish_reason is not None:
                break
            # The key of the draft is that of the token.
            request.computed += 1
        if drafts:
            own.acceptance.note(len(drafts), right)
            request.drafted += len(drafts)
            request.accepted += right
            request.new_accepted = right

    def _fits(self, requests: Sequence[Request]) -> bool:
        """Tell whether all these requests have room for drafts, none at the cost of another's pages."""
        if self.cache is None or any(r.limit - r.length < self.drafts for r in requests):
            return False
        needed = sum(max(PagedKVCache.pages_for(r.length + self.drafts) - len(r.pages), 0) for r in requests)
        return needed <= self.cache.available

    def _pays(self, requests: Sequence[Request]) -> bool:
        """Tell whether what the drafts of these requests may gain is worth the rows that they cost."""
        gain = sum(r.decoding.acceptance.expect(r.decoding.promised) for r in requests)
        count = len(requests)
        before = 1 + self.row_cost * (count - 1)
        after = 1 + self.row_cost * (count * (1 + self.drafts) - 1) + self.drafting_cost * before
        return gain > 0 and (count + gain) * before > count * after * MARGIN


def weight_bytes(model: LanguageModel) -> int:
    """Return what a model's weights take on this rank."""
    return sum(holder.loaded_bytes() + holder.kept_bytes() for _, holder in weight_holders(model))
