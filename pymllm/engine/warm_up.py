"""The launches of all steps that a model will run, so that its kernels are compiled before the first request.

A model without data goes through steps of every kind: decoding of each bucket, prompts of each size of tile. Nothing is
computed, and what its kernels would launch is noted.
"""

# R requests, T tokens of a step

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from pymllm.engine.decoding import DecodingBatch
from pymllm.engine.graphs import BUCKETS, why_not_captured
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.runner import Runner
from pymllm.engine.runs import Run
from pymllm.engine.states import StatePool
from pymllm.engine.strategies import make_strategy
from pymllm.kernels.triton.launch import Launch, recording
from pymllm.models.language_model import LanguageModel
from pymllm.models.strategy import Strategy

META = torch.device("meta")
# The longest piece of a prompt for which tiles differ from those of shorter ones.
LONGEST_PIECE = 8192


class StepsWithoutData:
    """Steps of a model on the meta device.

    max_length: the most tokens of a request.  cache_pages: of the KV cache.  state_slots: of requests' states.
    """

    def __init__(self, model: LanguageModel, max_length: int, cache_pages: int, state_slots: int) -> None:
        # Steps with drafts are those without, but for their tokens; what drafts may be a second model, with data.
        self.model, self.widths = model, model.strategy.widths
        self.strategy = make_strategy(Strategy() if model.strategy.drafts else model.strategy)
        block = self.strategy.block_length
        self.max_length = -(-max_length // block) * block
        self.runner = Runner(model, META, self.max_length, self.strategy)
        self.cache = PagedKVCache(model, cache_pages, META)
        self.runner.states = StatePool.of(model, state_slots, META)

    def decode(self, rows: int, width: int) -> None:
        """Run a step of `rows` requests, of `width` tokens each, as one that is captured."""
        batch = DecodingBatch(
            rows,
            self.cache.pages_for(min(self.max_length, self.cache.num_pages * self.cache.page_size)),
            self.cache.page_size,
            self.max_length,
            META,
            has_states=self.runner.states is not None,
            width=width,
            strategy=self.strategy,
        )
        self.runner._forward_decoding(batch)

    def run(self, *requests: tuple[int, int]) -> None:
        """Run a step eagerly.  requests: of each the new tokens, and those that it has afterwards."""
        count = len(requests)
        self.runner.run(
            Run(
                tokens=[[0] * new for new, _ in requests],
                starts=[length - new for new, length in requests],
                pages=[[0] * self.cache.pages_for(length) for _, length in requests],
                rows=[[new - 1] for new, _ in requests],
                prefilling=[new > 1 for new, _ in requests],
                adapters=[None] * count,
                slots=None if self.runner.states is None else [0] * count,
                scored=[range(0)] * count,
            ),
            self.cache,
        )


def sizes(longest: int) -> Iterator[int]:
    """Yield numbers of tokens, up to `longest`, for which tiles may differ: around the powers of two."""
    yield from range(2, min(longest, 16) + 1)
    power = 16
    while power < longest:
        yield from (size for size in (power + 1, power + power // 2, 2 * power) if size <= longest)
        power *= 2


def launches_of_steps(
    model: LanguageModel, max_length: int, cache_pages: int, state_slots: int
) -> list[Launch]:
    """Return what the steps of a model launch.

    model: on the meta device, every layer packed.  The others: as in `StepsWithoutData`.
    """
    steps = StepsWithoutData(model, max_length, cache_pages, state_slots)
    captured = why_not_captured(model) is None and not model.why_not_repeated
    longest = min(steps.max_length, steps.cache.num_pages * steps.cache.page_size)
    with recording() as launches:
        for width, rows in product(steps.widths, BUCKETS):
            if captured:
                steps.decode(rows, width)
            else:
                steps.run(*[(min(width, longest), longest)] * rows)
        if not captured:
            # How many splits attention makes of the keys follows from how many there are.
            for width, length in product(steps.widths, sizes(longest)):
                steps.run((min(width, length), length))
        for size in sizes(min(longest, LONGEST_PIECE)):
            steps.run((size, size))
    return launches
