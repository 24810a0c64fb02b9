"""Blocks of a text in the course of being filled, and which of their open positions take the tokens proposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pymllm.engine.choosing import TokenLogprobs

# What becomes of a block: not run yet, being filled, final but without keys in the cache, in the cache.
BlockStatus = Literal["DUMMY", "ACTIVE", "TO_CACHE", "IN_CACHE"]


@dataclass(eq=False)
class Block:
    """A block of a request, by places counted from its first position.

    block_id: its number; block i begins at position i times its length.  tokens: the mask token where it is open.
    editable_start: the place of its first token that is not the prompt's.
    """

    block_id: int
    tokens: list[int]
    mask_token_id: int
    editable_start: int = 0
    status: BlockStatus = "DUMMY"

    @property
    def block_size(self) -> int:
        return len(self.tokens)

    @property
    def start(self) -> int:
        """The position of its first token in the request."""
        return self.block_id * self.block_size

    @property
    def end(self) -> int:
        return self.start + self.block_size

    @property
    def open(self) -> list[int]:
        """The places that have no token yet."""
        return [place for place, token in enumerate(self.tokens) if token == self.mask_token_id]

    @property
    def num_mask_tokens(self) -> int:
        return self.tokens.count(self.mask_token_id)

    @property
    def progress(self) -> float:
        """The share of its places that have tokens."""
        return 1 - self.num_mask_tokens / self.block_size

    @property
    def is_complete(self) -> bool:
        return not self.num_mask_tokens

    @property
    def is_dummy(self) -> bool:
        return self.status == "DUMMY"

    @property
    def is_active(self) -> bool:
        return self.status == "ACTIVE"


@dataclass(eq=False)
class BlockState:
    """The state of a request that is decoded by blocks, kept over preemption.

    block: the one being filled, or about to be committed.  final: the one before it, if its keys are not in the cache.
    asked: the places of `block` that the logits of the step are for; its length is that of the next block's first.
    steps: how many forwards have filled the block.  post_edit_steps: how many have edited it since it was full.
    drawn: how many tokens have been proposed by chance.
    before: what the logits before the block propose for its first place, where that is open though the prompt has it.
    logprobs: those of tokens that have not come into the answer yet, by position.
    """

    block: Block
    final: Block | None = None
    asked: Sequence[int] = ()
    steps: int = 0
    post_edit_steps: int = 0
    drawn: int = 0
    before: Proposal | None = None
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)

    def open_next(self, *first: int) -> None:
        """Open the next block, which begins with the tokens `first`."""
        block = self.block
        masks = [block.mask_token_id] * (block.block_size - len(first))
        self.block = Block(block.block_id + 1, [*first, *masks], block.mask_token_id)
        self.steps = self.post_edit_steps = 0
        self.before = None


@dataclass(frozen=True)
class Proposal:
    """A token for a place.  chance: the probability of the token.  logprobs: if they are asked for."""

    token: int
    chance: float
    logprobs: TokenLogprobs | None = None


def scheduled(length: int, steps: int, step: int) -> int:
    """Return how many tokens a block takes at least in a forward, if it is to have `steps`.  step: counted from 0."""
    return length // steps + (step < length % steps)


def above_threshold(proposals: Mapping[int, Proposal], threshold: float, least: int) -> list[int]:
    """Choose the places whose tokens are likelier than the threshold; if they are fewer than `least`, the likeliest."""
    chosen = [place for place, proposal in proposals.items() if proposal.chance > threshold]
    return chosen if len(chosen) >= min(least, len(proposals)) else likeliest(proposals, least)


def likeliest(proposals: Mapping[int, Proposal], count: int) -> list[int]:
    """Choose the places of the likeliest tokens; of equal ones the first come first."""
    return sorted(proposals, key=lambda place: -proposals[place].chance)[:count]
