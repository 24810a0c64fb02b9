"""Block diffusion: a block of masked positions is filled over several steps, any of its positions at a time.

The whole blocks of a prompt are read; the rest of it opens the first block that is filled. A step runs the open block
and proposes a token at its open positions, of which some are accepted. Once a block is final, its keys are computed
from its final tokens: in one run with the next block (LLaDA2, SDAR), or in a run of its own where the logits are
shifted (Fast-dLLM v2), as these say what the next block begins with.
"""

# N rows of logits, V vocabulary, B block length

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm.engine.choosing import BANNED, describe, no_numbers, uniform
from pymllm.engine.request import Request
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.strategies.base import DecodingStrategy
from pymllm.engine.strategies.blocks import (
    Block,
    BlockState,
    Proposal,
    above_threshold,
    likeliest,
    scheduled,
)
from pymllm.errors import RequestError
from pymllm.kernels.copies import receive, upload
from pymllm.kernels.sampling import SETTINGS, SamplingBatch, SamplingKernel
from pymllm.layers.step import AttnMetaDataBase
from pymllm.models.strategy import Strategy

# What is usual where the family does not say: of SDAR, and of LLaDA2.1.
CONFIDENCE_THRESHOLD = 0.9
MAX_POST_EDIT_STEPS = 16

# For so many positions tokens are proposed at a time: on a GPU there are several copies of their logits.
PROPOSED_ROWS = 256

# What a request may ask of other strategies: it has no meaning where tokens come in any order, or is not done.
REFUSED = (
    *(
        "min_p",
        "typical_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "bad_words",
    ),
    *("json_schema", "regex", "grammar", "prompt_logprobs"),
)

# What has no use where the logits are shifted: a block is filled by its small blocks.
UNSHIFTED = ("denoising_steps", "remasking", "edit_threshold", "max_post_edit_steps")

# The settings that kernels need of a row which has none of its own.
NEUTRAL = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


@dataclass(eq=False)
class BlockDiffusionMetaData(AttnMetaDataBase):
    """A step in which tokens see their whole block, those of prompts too.

    status_table: made here: 0 for requests that read, 1 for those whose blocks are filled or committed.
    """

    prefix_causal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.status_table is None and self.cu_seqlens_q is not None:
            reads = self.is_prefill
            states = [not reads] * self.num_reqs if isinstance(reads, bool) else [not each for each in reads]
            (self.status_table,) = upload([torch.tensor(states, dtype=torch.int32)], self.cu_seqlens_q.device)

    @property
    def is_block_causal(self) -> bool:
        return self.block_size > 1


class BlockDiffusionStrategy(DecodingStrategy):
    """Decoding by blocks, as a checkpoint's `Strategy` has its settings.  `Request.decoding` is a `BlockState`.

    shifted: whether the logits at a position say what stands at the next one; a block is then filled by small blocks,
    from left to right.
    """

    name = "block_diffusion"
    metadata = BlockDiffusionMetaData
    refuses = REFUSED

    def __init__(self, chosen: Strategy) -> None:
        settings, family = chosen.settings, chosen.family
        self.block_length = int(settings["block_length"])
        self.small_block_length = int(settings.get("small_block_length", self.block_length))
        self.mask_token_id = int(settings["mask_token_id"])
        self.shifted = family is None or family.shifted
        self.threshold = CONFIDENCE_THRESHOLD if family is None else family.confidence_threshold

    @property
    def step_settings(self) -> Mapping[str, Any]:
        return {"block_size": self.block_length, "prefix_causal": False}

    def check(self, params: SamplingParams) -> None:
        super().check(params)
        for name in UNSHIFTED if self.shifted else ():
            if getattr(params, name) is not None:
                raise RequestError(
                    f"{name} has no use here: each step fills what is likely enough in a small block",
                    code="parameter",
                    tensor=name,
                    fix="Leave it out.",
                )
        if params.denoising_steps is not None and params.denoising_steps > self.block_length:
            raise RequestError(
                "denoising_steps is out of range: each step fills a position at least",
                code="parameter",
                tensor="denoising_steps",
                expected=f"an integer from 1 to {self.block_length}, the block length",
                found=str(params.denoising_steps),
            )

    def begin(self, request: Request) -> None:
        length, mask = self.block_length, self.mask_token_id
        rest = request.prompt[len(request.prompt) // length * length :]
        masks = [mask] * (length - len(rest))
        block = Block(len(request.prompt) // length, [*rest, *masks], mask, len(rest))
        request.decoding, request.block_size = BlockState(block), length
        if mask in rest:
            # They are filled in as well, so that pages do not hold what the prompt says.
            request.prompt, request.private = [*request.prompt], True

    def is_reading(self, request: Request) -> bool:
        state: BlockState = request.decoding
        waiting = state.block if state.final is None else state.final
        return request.computed < waiting.start

    def reach(self, request: Request) -> int:
        end: int = request.decoding.block.end
        return end

    def shareable(self, request: Request) -> int:
        block: Block = request.decoding.block
        # The last block before the seed is run for its logits.
        return block.start - (self.block_length if self._lacks_seed(block) else 0)

    def plan_run(self, request: Request, budget: int) -> int:
        state: BlockState = request.decoding
        block, first, length = state.block, request.computed, self.block_length
        reads = self.is_reading(request)
        if reads:
            count = request.start_step(min(block.start - first, max(budget // length, 1) * length))
            last = first + count == block.start
            state.asked = [0] if last and self._lacks_seed(block) else []
            request.rows = [count - 1 for _ in state.asked]
            request.blocks = (block,)
        else:
            final = state.final if state.final is not None and first < block.start else None
            request.new_tokens = 0
            request.running_sequence = [*(final.tokens if final is not None else ()), *block.tokens]
            state.asked = self._places(request, state)
            before = block.start - first - (1 if self.shifted else 0)
            request.rows = [before + place for place in state.asked]
            request.blocks = (block,) if final is None else (final, block)
            if block.is_dummy:
                block.status = "ACTIVE"
        request.is_reading = request.is_prefilling = reads
        return len(request.running_sequence)

    def end_run(self, request: Request) -> None:
        state: BlockState = request.decoding
        block = state.block
        if request.is_reading:
            request.computed += len(request.running_sequence)
        else:
            request.computed = block.start
            if block.status == "TO_CACHE":
                request.computed, block.status = block.end, "IN_CACHE"
        if state.final is not None and request.computed >= state.final.end:
            state.final.status, state.final = "IN_CACHE", None

    def choose(self, requests: Sequence[Request], logits: Tensor, kernel: SamplingKernel) -> list[Any]:
        settings: list[tuple[float, ...]] = []
        biases: list[list[int]] = []
        for request in requests:
            state, params = request.decoding, request.params
            answer = state.block.start - len(request.prompt)
            for nth, place in enumerate(state.asked):
                number = 0.0 if params.greedy else uniform(request.sampler.seed, state.drawn + nth)
                settings.append(_row(params, number))
                ends = request.sampler.ends if 0 <= answer + place < params.min_tokens else ()
                biases.append([self.mask_token_id, *ends])
        parts = []
        for first in range(0, len(settings), PROPOSED_ROWS):
            some = slice(first, first + PROPOSED_ROWS)
            parts.append(kernel.propose(logits[some], _batch(settings[some], biases[some])))
        # One copy from the device; a token is exact in float64.
        found = receive(torch.cat([torch.stack((tokens.double(), chances)) for tokens, chances in parts], 1))
        entries: list[Any] = []
        done = 0
        for request in requests:
            rows = slice(done, done + len(request.decoding.asked))
            done = rows.stop
            mine = [int(token) for token in found[0][rows]]
            if min(mine) < 0:
                entries.append(None)
                continue
            count = request.params.logprobs
            logprobs: Sequence[Any] = [None] * len(mine)
            if count is not None:
                # Of what may be proposed at all.
                barred = (
                    logits[rows]
                    .float()
                    .index_fill(-1, torch.tensor([self.mask_token_id], device=logits.device), BANNED)
                )
                logprobs = describe(barred, mine, count, kernel)
            entries.append(list(zip(mine, found[1][rows], logprobs, strict=True)))
        return entries

    def accept(self, request: Request, chosen: Any, end_tokens: frozenset[int]) -> None:
        if chosen is None:
            request.fail(no_numbers())
            return
        state: BlockState = request.decoding
        places = zip(state.asked, chosen, strict=True)
        proposals = {place: Proposal(*entry) for place, entry in places}
        if not request.params.greedy:
            state.drawn += len(proposals)
        if request.is_reading and state.block.editable_start:
            # The prompt has a mask there: it is filled as any other, and no seed.
            state.before = proposals[0]
        elif request.is_reading or state.block.status == "IN_CACHE":
            self._take_seed(request, next(iter(proposals.values())), end_tokens)
        elif self.shifted:
            if state.before is not None and 0 in state.block.open:
                small = set(state.block.open) & set(range(self.small_block_length))
                proposals = {place: found for place, found in proposals.items() if place in small}
                proposals[0] = state.before
            self._fill(request, above_threshold(proposals, self._threshold(request), 1), proposals)
            self._publish(request, end_tokens)
        else:
            self._denoise(request, proposals, end_tokens)
        self._limit(request, end_tokens)
        if self.shifted and request.finish_reason is None and not self._shifted_open(state):
            state.block.status = "TO_CACHE"

    def _threshold(self, request: Request) -> float:
        asked = request.params.confidence_threshold
        return self.threshold if asked is None else asked

    def _lacks_seed(self, block: Block) -> bool:
        """Tell whether a block waits for its first token, which the logits before it say."""
        return self.shifted and block.tokens[0] == self.mask_token_id and block.start > 0

    def _places(self, request: Request, state: BlockState) -> list[int]:
        """Choose the places of the block that a step makes proposals for."""
        block = state.block
        if not self.shifted:
            if request.params.edit_threshold is None:
                return block.open
            own = range(block.editable_start, block.block_size)
            return [place for place in range(block.block_size) if place in own or place in block.open]
        places = self._shifted_open(state)
        if not places:
            return [block.block_size]
        small = places[0] // self.small_block_length
        # The first place has its proposal already; a run has to ask for something.
        return [place for place in places if place and place // self.small_block_length == small] or [1]

    @staticmethod
    def _shifted_open(state: BlockState) -> list[int]:
        """Return the open places; the first only if there is a proposal for it, as the block gives none itself."""
        return [place for place in state.block.open if place or state.before is not None]

    def _denoise(
        self, request: Request, proposals: Mapping[int, Proposal], end_tokens: frozenset[int]
    ) -> None:
        """Take a step of a block that is filled as a whole, and edited perhaps."""
        state, params = request.decoding, request.params
        block: Block = state.block
        masked = {place: proposals[place] for place in block.open}
        chosen: list[int] = []
        if masked:
            least = scheduled(self.block_length, params.denoising_steps or self.block_length, state.steps)
            if params.remasking == "sequential":
                chosen = list(masked)[:least]
            elif params.remasking == "low_confidence_static":
                chosen = likeliest(masked, least)
            else:
                chosen = above_threshold(masked, self._threshold(request), least)
            state.steps += 1
        else:
            state.post_edit_steps += 1
        if params.edit_threshold is not None:
            chosen += [
                place
                for place, proposal in proposals.items()
                if place not in masked
                and proposal.token != block.tokens[place]
                and proposal.chance > params.edit_threshold
            ]
        self._fill(request, chosen, proposals)
        if params.edit_threshold is None:
            self._publish(request, end_tokens)
        if request.finish_reason is not None or block.num_mask_tokens:
            return
        if params.edit_threshold is not None:
            most = MAX_POST_EDIT_STEPS if params.max_post_edit_steps is None else params.max_post_edit_steps
            if chosen and state.post_edit_steps < most:
                return
            self._publish(request, end_tokens)
        if chosen:
            block.status, state.final = "TO_CACHE", block
        else:
            # The step has computed the keys from just these tokens.
            block.status, request.computed = "IN_CACHE", block.end
        state.open_next()

    def _fill(self, request: Request, chosen: Sequence[int], proposals: Mapping[int, Proposal]) -> None:
        """Put the tokens proposed at the places chosen into the block; count them that are new and below the limit."""
        state: BlockState = request.decoding
        block, prompt = state.block, len(request.prompt)
        for place in chosen:
            position, proposal = block.start + place, proposals[place]
            if position < prompt:
                request.prompt[position] = proposal.token
            elif block.tokens[place] == self.mask_token_id and position < request.limit:
                request.new_tokens += 1
                request.decoded += not request.is_reading
            block.tokens[place] = proposal.token
            if proposal.logprobs is not None:
                state.logprobs[position] = proposal.logprobs

    def _take_seed(self, request: Request, proposal: Proposal, end_tokens: frozenset[int]) -> None:
        """Begin a block with the token that the logits before it say."""
        state: BlockState = request.decoding
        if not request.is_reading:
            state.open_next(self.mask_token_id)
        self._fill(request, [0], {0: proposal})
        self._publish(request, end_tokens)

    def _publish(self, request: Request, end_tokens: frozenset[int]) -> None:
        """Append to the answer what has come to stand behind it without a gap; end it where it ends."""
        state: BlockState = request.decoding
        counted, block = (request.new_tokens, request.decoded), state.block
        for token in block.tokens[max(request.length - block.start, 0) :]:
            if token == self.mask_token_id or request.finish_reason is not None:
                break
            if request.params.logprobs is not None:
                request.logprobs.append(state.logprobs.pop(request.length))
            self.take(request, token, end_tokens)
        # They were counted when they were accepted.
        request.new_tokens, request.decoded = counted

    def _limit(self, request: Request, end_tokens: frozenset[int]) -> None:
        """End a request that has had its decoding steps, or whose answer has got into a run of one token."""
        params = request.params
        spent = params.max_nfe is not None and request.forwards >= params.max_nfe
        run = (
            params.max_repetition_run is not None and _run_length(request.answer) >= params.max_repetition_run
        )
        if request.finish_reason is not None or not (spent or run):
            return
        self._publish(request, end_tokens)
        if request.finish_reason is not None:
            return
        request.finish_reason = "length"
        request.max_nfe_reached, request.max_repetition_run_reached = spent, run


def _run_length(answer: Sequence[int]) -> int:
    """Count the equal tokens at the end of an answer."""
    count = 0
    while count < len(answer) and answer[-1 - count] == answer[-1]:
        count += 1
    return count


def _row(params: SamplingParams, number: float) -> tuple[float, ...]:
    """Return a row of `SamplingBatch.settings`."""
    own = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "number": number}
    return tuple(float(own[name] if name in own else NEUTRAL[name]) for name in SETTINGS)


def _batch(settings: Sequence[tuple[float, ...]], barred: Sequence[Sequence[int]]) -> SamplingBatch:
    """Make the batch of rows with these settings, in which these tokens cannot come."""
    starts = [0]
    for row in barred:
        starts.append(starts[-1] + len(row))
    return SamplingBatch(
        torch.tensor(settings, dtype=torch.float64),
        torch.tensor(starts),
        torch.tensor([token for row in barred for token in row], dtype=torch.int64),
        torch.full((starts[-1],), BANNED),
        torch.zeros(len(starts), dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
        torch.empty(0),
    )
