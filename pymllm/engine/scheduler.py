"""The scheduler: it chooses the requests of the next step, their tokens and their pages."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.prefixes import PageKeys, State, current_state
from pymllm.engine.request import Request
from pymllm.engine.states import StatePool
from pymllm.engine.strategies.autoregressive import Autoregressive
from pymllm.engine.strategies.base import DecodingStrategy

MAX_REQUESTS = 64
STEP_TOKENS = 1024

# The next turn of a chat may go on otherwise than a prompt did at its end: so many tokens are not counted on.
PROMPT_ENDING = 8

# From how many tokens on a prompt's state is worth a step of its own, which ends where it is remembered.
REMEMBERED_TOKENS = 64


class Scheduler:
    """The requests that share the pages of one cache; whoever came first goes first.

    A step goes on with every request that has read its prompt, by one token or as its strategy says. What is left of
    `step_tokens` goes to prompts, so that a long prompt is read in several steps, and the answers of others go on
    beside it; beside answers it reads no more than `piece` tokens.

    A request gets the pages of its prompt when it is admitted, and one more page whenever it has filled those. When no
    page is free, the request that was admitted last gives all of its pages back (it is preempted), and later reads its
    prompt and its answer again.

    What others have computed of the same text is not computed again (`reuse`): a request takes the full pages that hold
    its first tokens, all but those of its last token, and waits for pages that an earlier request is about to fill.
    Pages that are given back stay as they are until they are needed, so that a request that was preempted finds them.

    Where layers keep states (`states`), a request has a slot for its own while it runs; a state is made anew when the
    request was preempted. Pages are then of use only up to where a state is remembered: near the end of a prompt, and
    of an answer.

    whole: whether keys depend on how long their request is (`CausalLM.keys_depend_on_length`). A prompt is then read
    in one step, a request gets all the pages that it may ever need when it is admitted, and pages are not shared.
    piece: tells how many tokens a step may read beside answers, the same on all ranks; None: `step_tokens` alone count.
    state: tells what state the model is in, the same on all ranks; pages from another state are of no use.
    strategy: says which tokens a request's next step runs.
    """

    def __init__(
        self,
        cache: PagedKVCache,
        *,
        whole: bool,
        reuse: bool = True,
        piece: Callable[[], int] | None = None,
        state: Callable[[], State] = current_state,
        states: StatePool | None = None,
        strategy: DecodingStrategy | None = None,
    ) -> None:
        self.states, self.strategy = states, strategy or Autoregressive()
        # Pages are shared by groups that end where a block ends.
        block = self.strategy.block_length
        self._group = math.lcm(block, cache.page_size) // cache.page_size
        # How many pages a running request may need for its next step.
        self._ahead = 1 if block == 1 else PagedKVCache.pages_for(2 * block) + 1
        self.cache, self.whole, self.reuse = cache, whole, reuse and not whole
        self._piece = piece
        self._state, self._now = state, (0, 0)
        self.max_requests, self.step_tokens = MAX_REQUESTS, STEP_TOKENS
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission

    def schedule(self) -> list[Request]:
        """Choose the requests of the next step, if any, and the tokens of each (`Request.running_sequence`)."""
        step: list[Request] = []
        left = self.step_tokens
        going = [request for request in self.running if not self._is_reading(request)]
        self.strategy.look_ahead(going)
        step += [request for request in going if self._grow(request)]
        self.strategy.draft(step)
        for request in step:
            left -= self.strategy.plan_run(request, left)
        if self.strategy.block_length > 1:
            # Many answers by long blocks do not keep a prompt waiting for ever.
            left = max(left, self.strategy.block_length)
        if step and self._piece is not None and (self.waiting or len(step) < len(self.running)):
            left = min(left, self._piece())
        if self.reuse and (self.waiting or len(step) < len(self.running)):
            self._now = self._state()
        reading: list[Request] = []
        for request in self.running:
            if left > 0 and self._is_reading(request):
                left -= self._read(request, reading, step, left)
        while left > 0 and (admitted := self._admit()) is not None:
            left -= self._read(admitted, reading, step, left)
        return step

    def keep(self, request: Request) -> None:
        """Have others find the pages that a request has filled.  Call it after each of its steps."""
        size = self.cache.page_size
        full = request.computed // size // self._group * self._group
        self._remember(request)
        if not self.reuse or request.private or full <= request.kept_pages:
            return
        for page, key in zip(
            request.pages[request.kept_pages : full],
            request.keys(size)[request.kept_pages : full],
            strict=True,
        ):
            self.cache.keep(page, key)
        request.kept_pages = full

    def remove(self, request: Request) -> None:
        """Take a request out, whether it runs or waits; its pages and its state are free at once.

        Nobody finds what a request that failed has computed.
        """
        for line in (self.waiting, self.running):
            if request in line:
                line.remove(request)
        if request.error is not None:
            self.cache.forget(request.pages)
            if self.states is not None:
                for key in (*request.prompt_states, *filter(None, [request.answer_state])):
                    self.states.forget(key)
        self._take_memory(request)

    def _admit(self) -> Request | None:
        """Take in the request that waits first, if there is room for it."""
        if not self.waiting or len(self.running) >= self.max_requests:
            return None
        if self.states is not None and not self.states.available:
            return None
        request = self.waiting[0]
        known = self._find_known(request)
        reach = request.limit if self.whole or request.reads_only else self.strategy.reach(request)
        needed = PagedKVCache.pages_for(reach) - len(known)
        # Pages are left for each running request, so that none preempts this one for its next step.
        spare = 0 if self.whole else len(self.running) * self._ahead
        if needed + spare > self.cache.available - self.cache.count_free(known):
            return None
        self.running.append(self.waiting.popleft())
        self.cache.share(known)
        request.pages = known + self.cache.allocate(needed)
        there = True
        if self.states is not None:
            request.state_slot = self.states.allocate()
            if known:
                there = self.states.recall(request.page_keys.made[len(known) - 1], request.state_slot)
        # Else it reads all of its tokens, which gives pages what they hold already.
        self._skip(request, len(known) if there else 0)
        if not request.admitted_at:
            request.admitted_at = time.perf_counter()
        return request

    def _read(self, request: Request, reading: list[Request], step: list[Request], left: int) -> int:
        """Add the next piece of a prompt to the step.  Returns its number of tokens, at most `left`.

        reading: the requests before it that read; it is added.  If one of these is about to fill the request's next
        page, the request waits for that instead, and 0 is returned.
        """
        follow = self._follow if self.states is None else self._follow_state
        if self.reuse and follow(request, reading):
            return 0
        reading.append(request)
        step.append(request)
        if self.whole:
            return self._plan(request, request.length)
        # A step ends where its state is to be remembered.
        upto = next((place for place in request.state_places if place > request.computed), request.length)
        return self._plan(request, min(upto - request.computed, left))

    def _is_reading(self, request: Request) -> bool:
        return request.reads_only or self.strategy.is_reading(request)

    def _plan(self, request: Request, budget: int) -> int:
        """Set the next run of a request that reads.  Returns its number of tokens, at most `budget`."""
        if request.reads_only:
            return request.start_reading(budget)
        return self.strategy.plan_run(request, budget)

    @property
    def _remembers(self) -> bool:
        most = 0 if self.states is None else self.states.most_remembered
        return most > 0 and self.reuse

    def _choose_places(self, request: Request, shared: int) -> tuple[int, ...]:
        """Choose after how many tokens of a prompt the state is to be remembered.

        shared: how many pages others have filled with the same text, from the first on, but without a state at the end:
        what is shared once will be shared again.
        """
        if not self._remembers:
            return ()
        size = self.cache.page_size
        ending = min(len(request.prompt) - PROMPT_ENDING, request.reusable) // size * size
        places = {place for place in (shared * size, ending) if REMEMBERED_TOKENS <= place <= ending}
        return tuple(sorted(places))

    def _remember(self, request: Request) -> None:
        """Remember the state of a request that is at a page's end, where that is worth it."""
        size, slot = self.cache.page_size, request.state_slot
        if self.states is None or slot is None or request.computed % size or not self._remembers:
            return
        key = request.keys(size)[request.computed // size - 1]
        if request.computed in request.state_places:
            request.prompt_states.append(key)
            self.states.remember(key, slot)
        elif request.computed > len(request.prompt) and len(self.running) * 2 <= self.states.most_remembered:
            # With more requests their answers would push out each other's states.
            self.states.remember(key, slot)
            if request.answer_state is not None:
                self.states.forget(request.answer_state)
            request.answer_state = key

    def _follow(self, request: Request, reading: list[Request]) -> bool:
        """Take the pages that others have filled since the request began to read.

        Returns whether it waits for its next page.
        """
        size = self.cache.page_size
        if request.page_keys.origin != (self._now, request.adapter):
            return False
        keys = self._shareable_keys(request)
        for start in range(request.computed // size, len(keys), self._group):
            stop = start + self._group
            pages = self._find(keys[start:stop])
            if len(pages) < self._group:
                return any(keys[start] in other.page_keys.made[start : start + 1] for other in reading)
            self.cache.share(pages)
            self.cache.release(request.pages[start:stop])
            request.pages[start:stop] = pages
            self._skip(request, stop)
        return False

    def _shareable_keys(self, request: Request) -> list[bytes]:
        """Return the keys of the pages that others may have filled for a request, whole groups of them."""
        full = min(self.strategy.shareable(request), request.reusable) // self.cache.page_size
        return request.keys(self.cache.page_size)[: full // self._group * self._group]

    def _find(self, keys: Sequence[bytes]) -> list[int]:
        """Find the pages under these keys, up to the first that is not there."""
        known: list[int] = []
        for key in keys:
            page = self.cache.find(key)
            if page is None:
                break
            known.append(page)
        return known

    def _follow_state(self, request: Request, reading: list[Request]) -> bool:
        """Take the furthest state that others have remembered since the request began to read, and its pages.

        Returns whether it waits for one that another is about to reach.
        """
        size, states = self.cache.page_size, self.states
        assert states is not None and request.state_slot is not None
        if request.page_keys.origin != (self._now, request.adapter):
            return False
        keys, own = self._shareable_keys(request), request.computed // size
        for count in range(len(keys), own, -1):
            if not states.knows(keys[count - 1]):
                continue
            pages = [page for key in keys[own:count] if (page := self.cache.find(key)) is not None]
            if len(pages) == count - own:
                self.cache.share(pages)
                self.cache.release(request.pages[own:count])
                request.pages[own:count] = pages
                if states.recall(keys[count - 1], request.state_slot):
                    self._skip(request, count)
                else:
                    # It reads all of its tokens anew, which gives pages what they hold already.
                    request.computed = request.kept_pages = request.cached_tokens = 0
                break
        return any(
            max(request.computed, other.computed) < place <= len(keys) * size
            and other.page_keys.made[place // size - 1] == keys[place // size - 1]
            for other in reading
            for place in other.state_places
        )

    def _find_known(self, request: Request) -> list[int]:
        """Find the pages that hold the first tokens of a request which holds none."""
        if not self.reuse:
            return []
        origin = (self._now, request.adapter)
        if request.page_keys.origin != origin:
            request.page_keys = PageKeys(origin, self._group)
        known = self._find(self._shareable_keys(request))
        known = known[: len(known) // self._group * self._group]
        if self.states is not None:
            filled = len(known)
            while known and not self.states.knows(request.page_keys.made[len(known) - 1]):
                known.pop()
            request.state_places = self._choose_places(request, filled)
        return known

    def _skip(self, request: Request, pages: int) -> None:
        """Note that a request's first pages hold its tokens without a step."""
        there = pages * self.cache.page_size
        if not request.preemptions:
            request.cached_tokens += there - request.computed
        request.computed, request.kept_pages = there, pages

    def _grow(self, request: Request) -> bool:
        """Give a running request the pages of its next step.  Returns whether it still runs then."""
        while PagedKVCache.pages_for(self.strategy.reach(request)) > len(request.pages):
            # It was preempted for an earlier request.
            if not request.pages:
                return False
            if self.cache.available:
                request.pages += self.cache.allocate(1)
            else:
                self._preempt(self.running[-1])
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_memory(request)
        request.computed = request.kept_pages = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _take_memory(self, request: Request) -> None:
        self.cache.release(request.pages)
        request.pages = []
        if self.states is not None and request.state_slot is not None:
            self.states.release(request.state_slot)
            request.state_slot = None
