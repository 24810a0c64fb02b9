"""The dispatch of tokens to the ranks that hold their experts, and the way back of the answers."""

# T tokens here, K experts a token, S slots sent, R slots received, H hidden size

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.moe.metadata import DispatcherStage, DispatchMetadata
from pymllm.moe.topk import TopKOutput
from pymllm.parallel import Parallel

Phase = Literal["prefill", "decode"]


def expert_range(num_experts: int, rank: int, size: int) -> range:
    """Return the experts that a rank holds: consecutive ones, divided as evenly as can be; perhaps none."""
    return range(rank * num_experts // size, (rank + 1) * num_experts // size)


@dataclass(frozen=True)
class DispatcherOutput:
    """The slots that all ranks sent here, for the experts here to run.

    recv_hidden_states: [R, H].  recv_local_expert_ids: [R] or [R, K] int64, positions among the experts here; below 0:
    none of them.  recv_weights: float32, in the same shape.
    """

    metadata: DispatchMetadata
    recv_hidden_states: Tensor
    recv_local_expert_ids: Tensor
    recv_weights: Tensor


class TokenDispatcher(ABC):
    """The interface of dispatchers: `dispatch`, then the experts, then `combine`.

    Every rank makes every call, with or without tokens. `dispatch` and `combine` have two halves each, so that a
    backend can compute while it communicates. A call out of turn is a RuntimeError.
    """

    def __init__(self, parallel: Parallel, num_experts: int) -> None:
        self.parallel, self.num_experts = parallel, num_experts
        self.stage = DispatcherStage.INITIAL
        self.phase: Phase = "prefill"

    def set_forward_phase(self, phase: Phase) -> None:
        """Say whether the steps to come prefill (many tokens) or decode (few), for backends that treat them apart."""
        if phase not in ("prefill", "decode"):
            raise ConfigError(
                "a token dispatcher does not know the phase",
                code="phase",
                expected="prefill or decode",
                found=repr(phase),
            )
        self.phase = phase

    def dispatch(self, hidden_states: Tensor, topk: TopKOutput) -> DispatcherOutput:
        """Send tokens to their experts, and receive those of other ranks.

        hidden_states: [T, H], this rank's own tokens.  topk: their experts, by their indices in the layer.
        """
        self.dispatch_a(hidden_states, topk)
        return self.dispatch_b()

    def combine(self, answers: Tensor) -> Tensor:
        """Send answers back, and sum up those for each token.

        answers: [R, H], weighted, of the slots that `dispatch` gave.  Returns [T, H].
        """
        self.combine_a(answers)
        return self.combine_b()

    def reset(self) -> None:
        """Forget a dispatch whose answers will never come, so that the next one can begin."""
        self.stage = DispatcherStage.INITIAL

    @abstractmethod
    def dispatch_a(self, hidden_states: Tensor, topk: TopKOutput) -> None: ...

    @abstractmethod
    def dispatch_b(self) -> DispatcherOutput: ...

    @abstractmethod
    def combine_a(self, answers: Tensor) -> None: ...

    @abstractmethod
    def combine_b(self) -> Tensor: ...


class NaiveA2ADispatcher(TokenDispatcher):
    """A dispatcher over any group of ranks, by all-to-all: a token travels once for each of its experts.

    The rank that a token came from sums up its answers, in float32, in the order of ranks.
    """

    def dispatch_a(self, hidden_states: Tensor, topk: TopKOutput) -> None:
        self.stage.expect(DispatcherStage.INITIAL)
        check_routed(hidden_states, topk, self.num_experts)
        size = self.parallel.size
        starts = torch.tensor([expert_range(self.num_experts, r, size).start for r in range(size)])
        starts = starts.to(topk.ids.device)
        experts = topk.ids.flatten()
        # The owner of an expert is the last rank whose experts start at or before it.
        owners = torch.searchsorted(starts, experts, right=True) - 1
        order = owners.argsort(stable=True)
        tokens = order // max(topk.ids.shape[1], 1)
        splits = torch.bincount(owners, minlength=size).tolist()
        local = experts[order] - starts[owners[order]]
        index = torch.stack((local, tokens), dim=-1)  # [S, 2]
        received, recv_splits = self.parallel.all_to_all(index, splits)
        hidden, _ = self.parallel.all_to_all(hidden_states[tokens], splits, recv_splits)
        weights, _ = self.parallel.all_to_all(topk.weights.float().flatten()[order], splits, recv_splits)
        self._metadata = DispatchMetadata(
            num_tokens=hidden_states.shape[0],
            hidden_size=hidden_states.shape[1],
            dtype=hidden_states.dtype,
            device=hidden_states.device,
            send_splits=splits,
            recv_splits=recv_splits,
            sent_tokens=tokens,
            recv_hidden_states=hidden,
            recv_local_expert=received[:, 0],
            recv_token_indices=received[:, 1],
            recv_weights=weights,
        )
        self.stage = DispatcherStage.AFTER_DISPATCH_A

    def dispatch_b(self) -> DispatcherOutput:
        self.stage.expect(DispatcherStage.AFTER_DISPATCH_A)
        self.stage = DispatcherStage.AFTER_DISPATCH_B
        found = self._metadata
        return DispatcherOutput(found, found.recv_hidden_states, found.recv_local_expert, found.recv_weights)

    def combine_a(self, answers: Tensor) -> None:
        self.stage.expect(DispatcherStage.AFTER_DISPATCH_B)
        found = self._metadata
        if answers.shape != (found.total_recv_slots, found.hidden_size):
            raise ValueError(
                f"combine needs one answer for each slot, {[found.total_recv_slots, found.hidden_size]}, "
                f"not {list(answers.shape)}"
            )
        back, sent = list(found.recv_splits), list(found.send_splits)
        self._returned, _ = self.parallel.all_to_all(answers.float(), back, sent)
        self.stage = DispatcherStage.AFTER_COMBINE_A

    def combine_b(self) -> Tensor:
        self.stage.expect(DispatcherStage.AFTER_COMBINE_A)
        found, returned = self._metadata, self._returned
        del self._metadata, self._returned
        self.stage = DispatcherStage.INITIAL
        total = torch.zeros((found.num_tokens, found.hidden_size), dtype=torch.float32, device=found.device)
        return total.index_add_(0, found.sent_tokens, returned).to(found.dtype)


def check_routed(hidden_states: Tensor, topk: TopKOutput, num_experts: int) -> None:
    """Check that these are tokens [T, H], each with experts that exist.  ValueError if not."""
    if hidden_states.ndim != 2:
        raise ValueError(f"hidden states must be [T, H], not {list(hidden_states.shape)}")
    ids, weights = topk.ids, topk.weights
    if ids.ndim != 2 or ids.shape[0] != hidden_states.shape[0] or weights.shape != ids.shape:
        raise ValueError(
            f"{hidden_states.shape[0]} tokens need expert ids and weights [T, K], "
            f"not {list(ids.shape)} and {list(weights.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"expert ids must be integers, not {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(
            f"expert ids must lie in 0..{num_experts - 1}, found {int(ids.min())}..{int(ids.max())}"
        )
