"""One token at a time: each step runs the last token, and the logits after it choose the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pymllm.engine.choosing import choose
from pymllm.engine.request import Request
from pymllm.engine.sampling import BLOCK_SETTINGS
from pymllm.engine.strategies.base import ERRORS, DecodingStrategy, why_none
from pymllm.kernels.sampling import SamplingKernel


class Autoregressive(DecodingStrategy):
    """The usual strategy; a request needs no state of its own."""

    name = "autoregressive"
    refuses = BLOCK_SETTINGS

    def is_reading(self, request: Request) -> bool:
        return request.missing > 1

    def reach(self, request: Request) -> int:
        return request.length

    def shareable(self, request: Request) -> int:
        return request.length - 1

    def plan_run(self, request: Request, budget: int) -> int:
        reads = request.missing > 1
        count = request.start_step(min(request.missing, max(budget, 1)))
        request.rows = [count - 1] if request.computed + count == request.length else []
        request.is_reading = reads or request.is_prefilling
        return count

    def end_run(self, request: Request) -> None:
        request.computed += len(request.running_sequence)

    def choose(self, requests: Sequence[Request], logits: Tensor, kernel: SamplingKernel) -> list[Any]:
        entries: list[Any] = choose(
            logits, [r.sampler for r in requests], [r.answer for r in requests], kernel
        )
        for index, request in enumerate(requests):
            if entries[index][0] is None:
                entries[index] = (None, why_none(request, logits[index]))
        return entries

    def accept(self, request: Request, chosen: Any, end_tokens: frozenset[int]) -> None:
        token, logprobs = chosen
        if token is None:
            request.fail(ERRORS[logprobs]())
            return
        if logprobs is not None:
            request.logprobs.append(logprobs)
        self.take(request, token, end_tokens)
