"""The engine: admits requests while pages last, steps all that run together, finishes them one by one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request, TokenLogprobs
from pymllm.engine.runner import Runner
from pymllm.engine.sampling import SamplingParams, sample
from pymllm.errors import RequestError
from pymllm.models.causal_lm import CausalLM
from pymllm.parallel import Parallel

MAX_BATCH = 64
DEFAULT_CACHE_TOKENS = 16384
CACHE_MEMORY_SHARE = 0.25  # of what is free, at most


class Engine:
    """Continuous batching over a paged KV cache.

    A request gets the pages for all it may ever hold when it is admitted, so that none is ever evicted; the others
    wait in order. New requests are prefilled together, then every step decodes one token of each.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        parallel: Parallel,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int,
        end_tokens: frozenset[int],
    ) -> None:
        self.model, self.parallel = model, parallel
        self.device, self.dtype = device, dtype
        self.max_length, self.end_tokens = max_length, end_tokens
        self.runner = Runner(model, device, max_length)
        self._cache: PagedKVCache | None = None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def cache(self) -> PagedKVCache:
        """Made on first use, so that logits alone need none."""
        if self._cache is None:
            page_bytes = PagedKVCache.bytes_per_page(self.model)
            wanted = max(self.max_length, DEFAULT_CACHE_TOKENS)
            affordable = int(_free_memory(self.device) * CACHE_MEMORY_SHARE) // page_bytes
            pages = max(1, min(PagedKVCache.pages_for(wanted), affordable))
            pages = self.parallel.broadcast_object(pages)
            self._cache = PagedKVCache(self.model, pages, self.device)
        return self._cache

    def add(self, request: Request) -> None:
        """Queue a request.  RequestError if it can never run: too long for the model, or for the whole cache."""
        request.limit = min(request.limit, self.check(request.prompt, request.params))
        request.restart_length = self.model.restart_length
        self.waiting.append(request)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """The tokens that a request may have in all.  RequestError if this model can never run it."""
        if not prompt:
            raise RequestError("the prompt has no tokens", code="prompt-empty", tensor="prompt")
        longest = min(self.max_length, self.cache.num_pages * self.cache.page_size)
        if len(prompt) >= longest:
            raise RequestError(
                "the prompt does not leave room for an answer",
                code="prompt-too-long",
                tensor="prompt",
                expected=f"fewer than {longest} tokens",
                found=str(len(prompt)),
                fix="Shorten it.",
            )
        vocabulary = self.model.config.size("vocab_size")
        bad = next((token for token, _ in params.logit_bias if token >= vocabulary), None)
        if bad is not None:
            raise RequestError(
                "logit_bias names a token outside the vocabulary",
                code="token-id",
                tensor="logit_bias",
                expected=f"0 to {vocabulary - 1}",
                found=str(bad),
            )
        return longest

    def step(self) -> list[Request]:
        """Admit what fits, run the model once, sample.  Returns the requests that got a token."""
        new = self._admit()
        batch = new or list(self.running)
        if not batch:
            return []
        logits = self.runner.step(batch, self.cache)
        for request, row in zip(batch, logits, strict=True):
            token, logprobs = sample(row, request.sampler, request.answer)
            token = self.parallel.broadcast_object(token)
            if logprobs is not None:
                request.logprobs.append(_top(token, logprobs, request.params.logprobs or 0))
            request.add_token(token, self.end_tokens)
        if new:
            self.running += new
        for request in [request for request in self.running if request.finish_reason is not None]:
            self._release(request)
        return batch

    def abort(self, request: Request) -> None:
        """End a request wherever it is; its pages are free at once."""
        request.finish_reason = request.finish_reason or "abort"
        if request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def retire(self, request: Request) -> None:
        """A running request that ended for a reason outside the engine (a stop string)."""
        if request in self.running:
            self._release(request)

    def _admit(self) -> list[Request]:
        new: list[Request] = []
        while self.waiting and len(self.running) + len(new) < MAX_BATCH:
            needed = PagedKVCache.pages_for(self.waiting[0].limit)
            if needed > len(self.cache.free):
                break
            request = self.waiting.popleft()
            request.pages = self.cache.allocate(needed)
            request.admitted_at = time.perf_counter()
            new.append(request)
        return new

    def _release(self, request: Request) -> None:
        if request in self.running:  # not there if its first step failed
            self.running.remove(request)
        self.cache.release(request.pages)
        request.pages = []


def _top(token: int, logprobs: torch.Tensor, count: int) -> TokenLogprobs:
    best = logprobs.topk(count)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(token, float(logprobs[token]), top)


def _free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as meminfo:
            available = next(line for line in meminfo if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 << 30  # not Linux: assume a small machine
