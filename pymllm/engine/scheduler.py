"""Which requests the next step runs, which of their tokens, and which pages they get."""

from __future__ import annotations

import time
from collections import deque

from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request

MAX_REQUESTS = 64
STEP_TOKENS = 1024


class Scheduler:
    """Requests over the pages of one cache; whoever came first goes first.

    A step brings one token of every request that has read its prompt. What is left of `step_tokens` goes to prompts,
    so that a long one is read in several steps, and the answers of others go on beside it.

    A request gets the pages of its prompt when it is admitted, and one more whenever it has filled those. When none is
    free, the request that was admitted last gives all of its pages back (it is preempted), and later reads its prompt
    and its answer again.

    whole: keys depend on how long their request is (`CausalLM.keys_depend_on_length`), so that a prompt is read in
    one step, and a request gets all the pages that it may ever need when it is admitted.
    """

    def __init__(self, cache: PagedKVCache, *, whole: bool) -> None:
        self.cache, self.whole = cache, whole
        self.max_requests, self.step_tokens = MAX_REQUESTS, STEP_TOKENS
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission

    def schedule(self) -> list[Request]:
        """The requests of the next step, each with its tokens (`Request.running_sequence`); [] if there are none."""
        step: list[Request] = []
        left = self.step_tokens
        for request in [request for request in self.running if request.missing == 1]:
            if self._grow(request):
                step.append(request)
                left -= request.start_step(1)
        for request in self.running:
            if request.missing > 1 and left > 0:
                step.append(request)
                left -= request.start_step(request.missing if self.whole else min(request.missing, left))
        while left > 0 and (admitted := self._admit()) is not None:
            step.append(admitted)
            left -= admitted.start_step(admitted.missing if self.whole else min(admitted.missing, left))
        return step

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is; its pages are free at once."""
        for line in (self.waiting, self.running):
            if request in line:
                line.remove(request)
        self._take_pages(request)

    def _admit(self) -> Request | None:
        """The request that waits first, if there is room for it."""
        if not self.waiting or len(self.running) >= self.max_requests:
            return None
        request = self.waiting[0]
        needed = PagedKVCache.pages_for(request.limit if self.whole else request.length)
        spare = 0 if self.whole else len(self.running)  # so that it is not preempted for their next page
        if needed + spare > len(self.cache.free):
            return None
        self.running.append(self.waiting.popleft())
        request.pages = self.cache.allocate(needed)
        if not request.admitted_at:
            request.admitted_at = time.perf_counter()
        return request

    def _grow(self, request: Request) -> bool:
        """Give a running request the page of its next token.  Whether it still runs then."""
        while PagedKVCache.pages_for(request.length) > len(request.pages):
            if not request.pages:  # preempted for an earlier one
                return False
            if self.cache.free:
                request.pages += self.cache.allocate(1)
            else:
                self._preempt(self.running[-1])
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._take_pages(request)
        request.computed = 0
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _take_pages(self, request: Request) -> None:
        self.cache.release(request.pages)
        request.pages = []
