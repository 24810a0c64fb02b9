"""Crowds of requests that come at random times: each answer is that of the request alone, and nothing stays behind."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pymllm import LLM, SamplingParams
from pymllm.engine.engine import Engine
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.pace import Pace
from pymllm.engine.request import Request
from pymllm.kernels.attention import PAGE_SIZE

# By how much a greedy token leads in float32, so that the last bits of sums, which depend on what else is in a step,
# do not choose. What is rounded to the codes of a KV cache may turn a code, and moves logits further.
LEAD = 1e-3
ROUNDED_LEAD = 0.3
ROUNDED = ("bfloat16", "float16", "int8", "fp8")


@dataclass(frozen=True)
class Asked:
    """A request.  arrival: before which step it comes."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int = 0
    adapter: str | None = None


@dataclass(frozen=True)
class Answer:
    """What a request answers.  leads: by how much each greedy token leads; none where that cannot be had."""

    tokens: tuple[int, ...]
    text: str
    reason: str
    leads: tuple[float, ...] = ()


@dataclass(frozen=True)
class Way:
    """How a crowd is run.

    step_tokens: how many tokens a step reads.  reuse: whether requests share pages.  tight: whether the cache holds
    hardly more than the longest request, so that requests are preempted.  paced: whether what is read beside answers
    changes from step to step, as the time that steps take would have it.
    """

    step_tokens: int = 1024
    reuse: bool = True
    tight: bool = False
    paced: bool = False

    def __str__(self) -> str:
        parts = [name for name in ("reuse", "tight", "paced") if getattr(self, name)]
        return " ".join([f"{self.step_tokens} tokens a step", *parts])


# Every size of a step, with and without reuse, pages enough and too few.
WAYS = (
    Way(),
    Way(reuse=False),
    Way(1, tight=True),
    Way(7, tight=True),
    Way(16, tight=True, paced=True),
    Way(16, reuse=False, tight=True),
    Way(64, paced=True),
    Way(1024, tight=True, paced=True),
)
ALL_WAYS = tuple(
    Way(*way) for way in itertools.product((1, 7, 16, 64, 1024), (True, False), (True, False), (True, False))
)


def renew(llm: LLM, pages: int = 1024, reuse: bool = True, step_tokens: int = 1024) -> LLM:
    """Give a model a new, empty cache, and states of their own where it has some."""
    engine = llm.engine
    engine.prefix_reuse = reuse
    if vars(engine).pop("scheduler", None) is not None and engine.states is not None:
        engine.states.close()
        del engine.states
    engine.cache = PagedKVCache(llm.model, pages, torch.device("cpu"))
    engine.scheduler.step_tokens = step_tokens
    # How prompts are cut is to follow from the requests alone, not from how busy the machine is.
    engine.pace, engine.clock = Pace(), lambda: 0.0
    return llm


def check_pages(engine: Engine) -> None:
    """Check that holds are counted exactly, free pages are nobody's, and keys and pages name each other."""
    cache, scheduler = engine.cache, engine.scheduler
    held = Counter(page for request in scheduler.running for page in request.pages)
    assert [held[page] for page in range(cache.num_pages)] == cache._holders
    assert sorted([*held, *cache.free]) == list(range(cache.num_pages))
    assert len(cache.free) == cache.available
    assert {page: key for key, page in cache._pages.items()} == cache._keys
    assert set(cache._reusable) == set(cache.free) & set(cache._keys)
    for request in scheduler.running:
        assert len(set(request.pages)) == len(request.pages)
        assert request.computed < request.length + (engine.strategy.block_length > 1)
    for request in scheduler.waiting:
        assert request.pages == [] and request.computed == 0
    if engine.states is not None:
        slots = [request.state_slot for request in scheduler.running]
        assert sorted([*slots, *engine.states._free]) == list(range(engine.states.count))
        assert all(request.state_slot is None for request in scheduler.waiting)


def check_nothing_left(engine: Engine) -> None:
    """Check that no request is in the engine, and that all pages and slots are free."""
    check_pages(engine)
    assert engine.idle and engine.cache.available == engine.cache.num_pages
    assert engine.states is None or engine.states.available == engine.states.count


def prompts(odds: random.Random, vocabulary: range, longest: int) -> Iterator[tuple[int, ...]]:
    """Make prompts without an end: of all lengths, many that begin alike, some that are the same."""
    common = [odds.choice(vocabulary) for _ in range(longest)]
    made: list[tuple[int, ...]] = []
    while True:
        begin = common[: odds.choice((0, 0, longest // 4, longest // 2 + 3, longest - 20))]
        own = odds.choice((1, 2, 9, 20) if begin else (1, 3, 16, 33, longest))
        made.append((*begin, *(odds.choice(vocabulary) for _ in range(own)))[:longest])
        if odds.random() < 0.2:
            made.append(odds.choice(made))
        yield made[-1]


def make_crowd(
    llm: LLM, count: int, seed: int = 0, *, longest: int = 90, answer: int = 48, sampled: float = 0.2
) -> list[tuple[Asked, Answer]]:
    """Draw requests, and answer each alone.  Greedy ones of which a token leads by too little are drawn again.

    longest: tokens of a prompt.  answer: tokens of an answer.  sampled: the share of those that are not greedy.
    """
    odds = random.Random(seed)
    drawn = prompts(odds, range(8, llm.config.size("vocab_size")), longest)
    lead = 0.0 if rounds(llm) else LEAD
    crowd: list[tuple[Asked, Answer]] = []
    renew(llm, reuse=False)
    while len(crowd) < count:
        settings: dict[str, Any] = {"max_tokens": odds.choice((1, 3, answer // 3, answer, answer))}
        settings["ignore_eos"] = odds.random() < 0.7
        if odds.random() < sampled:
            settings |= {"temperature": odds.choice((0.7, 1.3)), "seed": odds.randrange(2**63)}
        for _ in range(50):
            asked = Asked(next(drawn), SamplingParams(**settings), odds.randint(0, count // 2))
            found = alone(llm, asked)
            if min(found.leads, default=lead) >= lead:
                break
        else:
            raise AssertionError("the model's greedy tokens hardly lead: rounding would choose them")
        crowd.append((asked, found))
    return crowd


def rounds(llm: LLM) -> bool:
    """Tell whether keys and values are rounded to fewer bits than sums have."""
    kinds = [layer.problem.kv.dtype for layer in llm.engine.cache.layers if hasattr(layer, "problem")]
    return any(kind != torch.float32 for kind in kinds)


def alone(llm: LLM, asked: Asked) -> Answer:
    """Answer a request that nothing runs beside."""
    params, greedy = asked.params, asked.params.temperature == 0
    if greedy and params.logprobs is None and llm.engine.strategy.block_length == 1:
        params = replace(params, logprobs=2)
    with llm.session() as session:
        request = session.add(list(asked.prompt), params, asked.adapter)
        pieces = [piece for _ in until_done(session) for _, piece in session.step()]
    assert request.error is None, request.error
    output = pieces[-1].output
    leads = [entry.top[0][1] - entry.top[1][1] for entry in request.logprobs if len(entry.top) > 1]
    return Answer(output.token_ids, output.text, output.finish_reason, tuple(leads) if greedy else ())


def until_done(session: Any, most: int = 100_000) -> Iterator[int]:
    """Count steps while requests are unfinished."""
    for step in itertools.count():
        if not session.unfinished:
            return
        assert step < most, "the engine does not come to an end"
        yield step


def play(
    llm: LLM, crowd: Sequence[Asked], way: Way = Way(), seed: int = 0, step: Callable[..., Any] | None = None
) -> list[Request]:
    """Run a crowd, and check the pages after every step.  Returns each request, finished.

    step: runs the model's steps in place of the runner.
    """
    block = llm.engine.strategy.block_length
    longest = max(len(asked.prompt) + (asked.params.max_tokens or 0) for asked in crowd)
    pages = PagedKVCache.pages_for(longest + 2 * block) + 2 if way.tight else 1024
    renew(llm, pages, way.reuse, way.step_tokens)
    odds, inner = random.Random(seed), llm.engine.runner.step
    if way.paced:
        llm.engine.scheduler._piece = lambda: PAGE_SIZE * odds.choice((1, 1, 2, 5))
    llm.engine.runner.step = step or inner  # type: ignore[method-assign]
    order = sorted(range(len(crowd)), key=lambda index: crowd[index].arrival)
    requests: dict[int, Request] = {}
    sent: dict[int, list[Any]] = {index: [] for index in order}
    try:
        with llm.session() as session:
            for now in itertools.count():
                while len(requests) < len(order) and crowd[order[len(requests)]].arrival <= now:
                    index = order[len(requests)]
                    asked = crowd[index]
                    requests[index] = session.add(list(asked.prompt), asked.params, asked.adapter, index)
                there = session.unfinished
                ran = session.step()
                assert ran or not there, "nobody runs"
                for request, piece in ran:
                    sent[request.req_id] += [] if piece is None else [piece]
                check_pages(llm.engine)
                if len(requests) == len(order) and not session.unfinished:
                    break
    finally:
        del llm.engine.runner.step
    check_nothing_left(llm.engine)
    for index, request in requests.items():
        assert request.error is None, request.error
        assert [token for piece in sent[index] for token in piece.token_ids] == request.answer
        assert "".join(piece.text for piece in sent[index]) == sent[index][-1].output.text
    return [requests[index] for index in range(len(crowd))]


def compare(
    requests: Sequence[Request], expected: Sequence[Answer], exact: bool = True
) -> list[tuple[int, int]]:
    """Check that every answer is that of the request alone.

    exact: False: where codes are rounded, an answer may become another one at a token that leads by less than
    ROUNDED_LEAD. Sampled answers, whose leads are not known, may then differ.
    Returns which answers differ, and from which token on.
    """
    differ = []
    for index, (request, answer) in enumerate(zip(requests, expected, strict=True)):
        found = tuple(request.answer)
        if found == answer.tokens:
            assert request.finish_reason == answer.reason
            continue
        pairs = itertools.zip_longest(found, answer.tokens)
        place = next(place for place, (one, other) in enumerate(pairs) if one != other)
        differ.append((index, place))
        assert not exact and place < len(answer.tokens), (index, place, found, answer.tokens)
        assert not answer.leads or answer.leads[place] < ROUNDED_LEAD, (index, place, answer.leads[place])
    return differ


def check_against_whole_forwards(llm: LLM, crowd: Sequence[tuple[Asked, Answer]]) -> int:
    """Check greedy answers against the logits of one forward over all tokens, without a cache.  Returns how many."""
    checked = 0
    for asked, answer in crowd:
        if asked.params.temperature == 0:
            logits = llm.logits([*asked.prompt, *answer.tokens[:-1]], adapter=asked.adapter)
            assert logits[len(asked.prompt) - 1 :].argmax(-1).tolist() == list(answer.tokens)
            checked += 1
    return checked


def one_by_one(llm: LLM) -> Callable[..., torch.Tensor]:
    """Return a way to run a step whose numbers do not depend on what else is in it: a token, or a block, at a time.

    Rounded keys and values turn the last bit of a sum into another code.
    """
    unit = llm.engine.strategy.block_length

    def step(batch: list[Request], cache: PagedKVCache) -> torch.Tensor:
        rows = []
        for request in batch:
            tokens, start, wanted = request.running_sequence, request.computed, request.rows
            for first in range(0, len(tokens), unit):
                request.computed, request.running_sequence = start + first, tokens[first : first + unit]
                asked = [row - first for row in wanted if first <= row < first + unit]
                # Logits as well where nobody wants them: a product of no rows is another step.
                request.rows = asked or [0]
                row = llm.engine.runner._read([request], cache)
                if asked:
                    rows.append(row.clone())
            request.running_sequence, request.computed, request.rows = tokens, start, wanted
        return torch.cat(rows) if rows else row[:0]

    return step
