"""The scheduler: it chooses the requests of the next step, their tokens and their pages."""

from __future__ import annotations

import time
from collections import deque

from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request

MAX_REQUESTS = 64
STEP_TOKENS = 1024


class Scheduler:
    """The requests that share the pages of one cache; whoever came first goes first.

    A step runs one token of every request that has read its prompt. What is left of `step_tokens` goes to prompts, so
    that a long prompt is read in several steps, and the answers of others go on beside it.

    A request gets the pages of its prompt when it is admitted, and one more page whenever it has filled those. When no
    page is free, the request that was admitted last gives all of its pages back (it is preempted), and later reads its
    prompt and its answer again.

    whole: whether keys depend on how long their request is (`CausalLM.keys_depend_on_length`). A prompt is then read
    in one step, and a request gets all the pages that it may ever need when it is admitted.
    """

    def __init__(self, cache: PagedKVCache, *, whole: bool) -> None:
        self.cache, self.whole = cache, whole
        self.max_requests, self.step_tokens = MAX_REQUESTS, STEP_TOKENS
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission

    def schedule(self) -> list[Request]:
        """Choose the requests of the next step, if any, and the tokens of each (`Request.running_sequence`)."""
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
        """Take a request out, whether it runs or waits; its pages are free at once."""
        for line in (self.waiting, self.running):
            if request in line:
                line.remove(request)
        self._take_pages(request)

    def _admit(self) -> Request | None:
        """Take in the request that waits first, if there is room for it."""
        if not self.waiting or len(self.running) >= self.max_requests:
            return None
        request = self.waiting[0]
        needed = PagedKVCache.pages_for(request.limit if self.whole else request.length)
        # A page is left for each running request, so that none preempts this one for its next page.
        spare = 0 if self.whole else len(self.running)
        if needed + spare > len(self.cache.free):
            return None
        self.running.append(self.waiting.popleft())
        request.pages = self.cache.allocate(needed)
        if not request.admitted_at:
            request.admitted_at = time.perf_counter()
        return request

    def _grow(self, request: Request) -> bool:
        """Give a running request the page of its next token.  Returns whether it still runs then."""
        while PagedKVCache.pages_for(request.length) > len(request.pages):
            # It was preempted for an earlier request.
            if not request.pages:
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
