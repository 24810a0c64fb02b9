"""The records that routers, dispatchers and experts hand to one another."""

# T tokens here, K experts a token, E experts, R slots received, H hidden size

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.moe.topk import TopKOutput


@dataclass(frozen=True)
class RouterMetadata:
    """A router's decision.  router_logits: [T, E].  topk_ids: [T, K] int64.  topk_weights: [T, K] float32."""

    router_logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    @classmethod
    def empty(cls, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> RouterMetadata:
        """Make the decision for no tokens."""
        return cls(
            torch.empty((0, num_experts), device=device),
            torch.empty((0, top_k), dtype=torch.int64, device=device),
            torch.empty((0, top_k), device=device),
        )

    @classmethod
    def from_topk_output(cls, output: TopKOutput) -> RouterMetadata:
        """Take over what a router returned."""
        return cls(output.router_logits, output.ids, output.weights)


class DispatcherStage(enum.Enum):
    """The stage of a dispatcher: the value is the call that it takes next."""

    INITIAL = "dispatch_a"
    AFTER_DISPATCH_A = "dispatch_b"
    AFTER_DISPATCH_B = "combine_a"
    AFTER_COMBINE_A = "combine_b"

    def expect(self, wanted: DispatcherStage) -> None:
        """Check that this is the stage that a call needs.  RuntimeError if not."""
        if self is not wanted:
            raise RuntimeError(f"the dispatcher awaits {self.value}, so {wanted.value} cannot be called now")


@dataclass(frozen=True)
class DispatchMetadata:
    """A record of what a rank sent and received, which `combine` needs to send the answers back.

    num_tokens, hidden_size, dtype, device: of the tokens here.
    send_splits, recv_splits: the number of slots that went to each rank, and that came from it.
    sent_tokens: [S], the token that each sent slot was, in the order of sending.
    recv_hidden_states: [R, H].  recv_local_expert: [R], positions among the experts here.
    recv_token_indices: [R], each token's index on the rank that sent it.  recv_weights: [R] float32.
    """

    num_tokens: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    send_splits: Sequence[int]
    recv_splits: Sequence[int]
    sent_tokens: Tensor
    recv_hidden_states: Tensor
    recv_local_expert: Tensor
    recv_token_indices: Tensor
    recv_weights: Tensor

    @property
    def total_recv_slots(self) -> int:
        return sum(self.recv_splits)


@dataclass(frozen=True)
class ExpertExecutionMetadata:
    """The slots of a call of the experts (a slot is a token and one of its experts), sorted into blocks of one expert.

    packed_token_ids, packed_local_expert_ids, packed_weights: [num_slots], one of each slot, in the order of tokens.
    sorted_slot_ids: [num_tokens_post_padded], slots sorted by expert. The slots of each expert are padded to whole
    blocks, by the index num_slots.
    expert_block_ids: the expert of each block.
    """

    packed_token_ids: Tensor
    packed_local_expert_ids: Tensor
    packed_weights: Tensor
    num_slots: int
    sorted_slot_ids: Tensor
    expert_block_ids: Tensor
    num_tokens_post_padded: int
    block_size: int

    @classmethod
    def build(
        cls, topk_ids: Tensor, topk_weights: Tensor, num_experts: int, block_size: int
    ) -> ExpertExecutionMetadata:
        """Sort slots.  topk_ids: [T, K], positions among `num_experts`; below 0: no slot.  topk_weights: [T, K]."""
        here = (topk_ids >= 0).flatten()
        tokens = torch.arange(topk_ids.shape[0], device=topk_ids.device)
        tokens = tokens.repeat_interleave(topk_ids.shape[1])[here]
        experts, weights = topk_ids.flatten()[here], topk_weights.flatten()[here]
        counts = torch.bincount(experts, minlength=num_experts)
        blocks = -(-counts // block_size)
        ends = (blocks * block_size).cumsum(0)
        order = experts.argsort(stable=True)
        within = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[experts[order]]
        padded = int(ends[-1]) if num_experts else 0
        slots = torch.full((padded,), len(order), dtype=torch.int64, device=order.device)
        slots[(ends - blocks * block_size)[experts[order]] + within] = order
        block_experts = torch.arange(num_experts, device=order.device).repeat_interleave(blocks)
        return cls(tokens, experts, weights, len(order), slots, block_experts, padded, block_size)
