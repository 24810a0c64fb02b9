"""Long runs in which requests are aborted and parts of the engine fail at random: who is not concerned never notices.

Faults are put into the layers, the store of keys and values, the kernels that choose tokens, grammars, and whole steps;
some come once, so that the requests of the step have to get over it, and some again when each is tried alone.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pymllm import LLM, SamplingParams
from pymllm.engine.request import Request
from pymllm.engine.runner import MAX_TAPES
from pymllm.engine.session import Session
from pymllm.errors import RequestError
from pymllm.text.grammars import KEPT_GRAMMARS, Matcher

from .crowd import LEAD, Answer, Asked, alone, check_nothing_left, check_pages, prompts, renew

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2, "x"]}}, "required": ["a"]}
# What requests ask for, beside plain greedy answers.
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"temperature": 1.1, "seed": 5},
    {"temperature": 0.8, "seed": 2**64 - 1, "top_p": 0.9, "logprobs": 2},
    {"n": 3, "temperature": 1.0, "seed": 11},
    {"min_tokens": 6, "logprobs": 1},
    {"prompt_logprobs": 1},
    {"repetition_penalty": 1.2, "bad_words": ("the", "self")},
    {"regex": "[a-f]{4,9}!", "temperature": 1.0, "seed": 3},
    {"json_schema": {**SCHEMA, "additionalProperties": False}},
    {"stop": True},
    {"stop_token_ids": True},
)
# What can never run.
REFUSED: tuple[dict[str, Any], ...] = (
    {"regex": "("},
    {"json_schema": {"type": "array", "minItems": 3, "maxItems": 2}},
    {"logit_bias": {10**9 % 2**31: 1.0}},
)
LIVE = 20  # requests at a time
PAGES = 40


class Injected(Exception):
    """A fault that was put in."""


class Faults:
    """Faults at random in one model's engine.

    odds: of one at each call.  again: of another one at once when the calls that failed are made again.
    came: how many, by place.
    """

    def __init__(self, llm: LLM, odds: random.Random, rate: float) -> None:
        self.llm, self.odds, self.rate = llm, odds, rate
        self.again = 0.5
        self.came: Counter[str] = Counter()
        self._armed = True
        self._next: list[bool] = []

    @contextlib.contextmanager
    def inject(self) -> Iterator[Faults]:
        """Put faults in, and take them out again."""
        engine = self.llm.engine
        layers = [module for module in self.llm.model.modules() if hasattr(module, "store_selection")]
        kernel: Any = layers[-1].store_selection.kernel  # type: ignore[union-attr]
        blocks: Any = self.llm.model.model.layers
        places: list[tuple[str, Any, str]] = [
            ("layer", blocks[len(blocks) // 2].mlp, "forward"),
            ("store", type(kernel), "run"),
            ("sampling", type(engine.sampling_kernel), "choose"),
            ("log-probabilities", type(engine.sampling_kernel), "log_probabilities"),
            ("choice", engine.strategy, "choose"),
            ("grammar", Matcher, "allowed"),
            ("place in a grammar", Matcher, "accept"),
            ("step", engine.runner, "step"),
        ]
        own = [(owner, name, vars(owner).get(name)) for _, owner, name in places]
        for place, owner, name in places:
            setattr(owner, name, self._failing(place, getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, before in own:
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Have nothing fail for a while."""
        self._armed = False
        try:
            yield
        finally:
            self._armed = True

    def _failing(self, place: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._armed and self._falls():
                self.came[place] += 1
                raise Injected(place)
            return inner(*args, **kwargs)

        return call

    def _falls(self) -> bool:
        if self._next:
            return self._next.pop()
        if self.odds.random() >= self.rate:
            return False
        # The next calls are those of requests that are tried alone.
        self._next = [self.odds.random() < self.again for _ in range(self.odds.choice((0, 1, 4)))]
        return True


class Book:
    """What each of a few dozen requests answers alone, and what became of all that were made of them."""

    def __init__(
        self, llm: LLM, odds: random.Random, adapters: tuple[str | None, ...], each: int = 4
    ) -> None:
        self.llm, self.odds = llm, odds
        self.entries: list[tuple[Asked, Answer]] = []
        self.fates: Counter[str] = Counter()
        drawn = prompts(odds, range(8, llm.config.size("vocab_size")), 70)
        renew(llm, reuse=False)
        kinds = [kind for kind in KINDS if not set(kind) & set(llm.engine.strategy.refuses)]
        for kind, adapter, _ in itertools.product(kinds, adapters, range(each)):
            self._enter(drawn, kind, adapter)

    def _enter(self, drawn: Iterator[tuple[int, ...]], kind: dict[str, Any], adapter: str | None) -> None:
        settings = {"max_tokens": self.odds.choice((8, 20, 45)), "ignore_eos": "regex" not in kind, **kind}
        marks = {name: settings.pop(name, None) for name in ("stop", "stop_token_ids")}
        n = settings.get("n", 1)
        while True:
            asked = Asked(next(drawn), SamplingParams(**settings), adapter=adapter)
            answer = alone(self.llm, Asked(asked.prompt, asked.params.of_answer(0), adapter=adapter))
            if min(answer.leads, default=1.0) > LEAD:
                break
        if marks["stop"]:
            middle = len(answer.text) // 2
            settings["stop"] = (answer.text[middle : middle + 3] or "x",)
        if marks["stop_token_ids"]:
            settings["stop_token_ids"] = (answer.tokens[len(answer.tokens) // 2],)
        params = SamplingParams(**settings)
        for index in range(n):
            one = Asked(asked.prompt, params.of_answer(index), adapter=adapter)
            self.entries.append((one, alone(self.llm, one)))

    def settle(self, request: Request, number: int, text: str) -> None:
        """Check what became of a request.  number: of its entry.  text: what its pieces gave."""
        answer = self.entries[number][1]
        tokens = tuple(request.answer)
        if request.error is not None:
            assert isinstance(request.error, Injected), repr(request.error)
            self.fates["failed"] += 1
        elif request.finish_reason == "abort":
            self.fates["aborted"] += 1
        else:
            assert (tokens, text, request.finish_reason) == (answer.tokens, answer.text, answer.reason)
            self.fates["answered"] += 1
        assert tokens == answer.tokens[: len(tokens)]
        assert answer.text.startswith(text)


def live(book: Book, faults: Faults, count: int, step_tokens: int = 48) -> list[weakref.ref[Request]]:
    """Run `count` requests in one session, through all that may happen to them.  Returns references to them."""
    llm, odds = book.llm, book.odds
    scheduler = llm.engine.scheduler
    scheduler.step_tokens = odds.choice((7, 16, step_tokens, 1024))
    numbers: dict[Request, int] = {}
    texts: dict[Request, str] = {}
    made: list[weakref.ref[Request]] = []
    with llm.session() as session:
        while len(made) < count:
            while len(numbers) < LIVE and odds.random() < 0.8:
                number = odds.randrange(len(book.entries))
                asked = book.entries[number][0]
                request = session.add(list(asked.prompt), asked.params, asked.adapter)
                numbers[request], texts[request] = number, ""
                made.append(weakref.ref(request))
            if odds.random() < 0.02:
                refuse(session, odds)
            if numbers and odds.random() < 0.08:
                request = odds.choice(list(numbers))
                session.abort(request)
                book.settle(request, numbers.pop(request), texts.pop(request))
            for request, piece in session.step():
                texts[request] += piece.text if piece is not None else ""
                if request.finish_reason is not None:
                    book.settle(request, numbers.pop(request), texts.pop(request))
            assert set(numbers) == set(session.unfinished)
            check_pages(llm.engine)
    # Those that were still there have been cancelled.
    for request, number in numbers.items():
        book.settle(request, number, texts[request])
    assert session._texts == session._sent == {}
    with faults.none():
        cancel_streams(book)
    check_nothing_left(llm.engine)
    return made


def refuse(session: Session, odds: random.Random) -> None:
    """Ask for what can never run."""
    there = session.unfinished
    try:
        session.add([9] * odds.choice((4, 10_000)), SamplingParams(**odds.choice(REFUSED)))
    except RequestError:
        assert session.unfinished == there and list(session._sent) == there
        return
    raise AssertionError("what can never run was taken")


def cancel_streams(book: Book) -> None:
    """Read a little of two streams, and close them."""
    for _ in range(2):
        asked, answer = book.odds.choice(book.entries)
        stream = book.llm.stream(list(asked.prompt), asked.params, adapter=asked.adapter)
        text = "".join(piece.text for piece in itertools.islice(stream, book.odds.randint(1, 9)))
        stream.close()  # type: ignore[attr-defined]
        assert answer.text.startswith(text)


def misfortunes(
    llm: LLM,
    count: int,
    seed: int = 0,
    adapters: tuple[str | None, ...] = (None,),
    *,
    each: int = 4,
    rate: float = 0.004,
    session: int = 200,
    told: Callable[[int], None] = lambda done: None,
) -> tuple[Book, Faults]:
    """Run `count` requests through misfortunes, and check that nothing of them stays.

    each: how many requests of each kind there are.  rate: the odds of a fault at a call.  session: requests in one
    session.  told: is called after each session, with the number of requests so far.
    """
    odds = random.Random(seed)
    book = Book(llm, odds, adapters, each)
    renew(llm, PAGES)
    faults = Faults(llm, odds, rate)
    done = 0
    with faults.inject():
        while done < count:
            made = live(book, faults, min(session, count - done))
            done += len(made)
            gc.collect()
            assert [ref for ref in made if ref() is not None] == []
            assert len(llm.engine.runner._decoding) <= MAX_TAPES
            assert len(llm.grammars._kept) <= KEPT_GRAMMARS
            told(done)
    check_nothing_left(llm.engine)
    return book, faults


def resident() -> int:
    """Return the bytes of memory that this process has, on Linux."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096
