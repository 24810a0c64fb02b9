"""The dispatcher that moves tokens between NVIDIA GPUs by the kernels of DeepEP (github.com/deepseek-ai/DeepEP).

A token travels once to each rank that has some of its experts; there the ids of its other experts are -1. Only DeepEP's
normal kernels are used, which serve both phases.
"""

# T tokens here, K experts a token, R tokens received, H hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymllm.errors import ConfigError, counted
from pymllm.moe.dispatcher import DispatcherOutput, TokenDispatcher, check_routed
from pymllm.moe.metadata import DispatcherStage, DispatchMetadata
from pymllm.moe.topk import TopKOutput
from pymllm.parallel import Parallel


class DeepEPDispatcher(TokenDispatcher):
    """A dispatcher over DeepEP's buffer.

    Hidden states must be bfloat16 on a GPU, and all ranks must have equally many experts.
    """

    def __init__(self, parallel: Parallel, num_experts: int) -> None:
        super().__init__(parallel, num_experts)
        if num_experts % parallel.size:
            raise ConfigError(
                f"DeepEP cannot divide {counted(num_experts, 'expert')} over {parallel.size} ranks",
                code="dispatcher",
                expected="equally many experts on every rank",
                fix="Use the naive dispatcher.",
            )
        self._buffer: Any = None

    def _buffer_for(self, hidden_bytes: int) -> Any:
        """Return the buffer, made for the hidden size of the first call: a model has only one.

        hidden_bytes: of one token's hidden state.
        """
        if self._buffer is None:
            import deep_ep

            size, hints = self.parallel.size, [0, 0]
            for config in (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size)):
                hints[0] = max(hints[0], config.get_nvl_buffer_size_hint(hidden_bytes, size))
                hints[1] = max(hints[1], config.get_rdma_buffer_size_hint(hidden_bytes, size))
            self._buffer = deep_ep.Buffer(torch.distributed.group.WORLD, *hints)
        return self._buffer

    def dispatch_a(self, hidden_states: Tensor, topk: TopKOutput) -> None:
        self.stage.expect(DispatcherStage.INITIAL)
        check_routed(hidden_states, topk, self.num_experts)
        if hidden_states.dtype is not torch.bfloat16 or not hidden_states.is_cuda:
            raise ValueError(
                f"DeepEP moves bfloat16 on a GPU, not {hidden_states.dtype} on {hidden_states.device}"
            )
        buffer = self._buffer_for(hidden_states.shape[1] * hidden_states.itemsize)
        ids, weights = topk.ids.to(torch.int64), topk.weights.float()
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, self.num_experts)
        received, local, received_weights, _, self._handle, _ = buffer.dispatch(
            hidden_states.contiguous(),
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        none = ids.new_empty(0)
        metadata = DispatchMetadata(
            num_tokens=hidden_states.shape[0],
            hidden_size=hidden_states.shape[1],
            dtype=hidden_states.dtype,
            device=hidden_states.device,
            send_splits=per_rank.tolist(),
            recv_splits=[received.shape[0]],
            sent_tokens=none,
            recv_hidden_states=received,
            recv_local_expert=local,
            recv_token_indices=none,
            recv_weights=received_weights,
        )
        self._output = DispatcherOutput(metadata, received, local, received_weights)
        self.stage = DispatcherStage.AFTER_DISPATCH_A

    def dispatch_b(self) -> DispatcherOutput:
        self.stage.expect(DispatcherStage.AFTER_DISPATCH_A)
        self.stage = DispatcherStage.AFTER_DISPATCH_B
        return self._output

    def combine_a(self, answers: Tensor) -> None:
        self.stage.expect(DispatcherStage.AFTER_DISPATCH_B)
        self._combined, _, _ = self._buffer.combine(answers.contiguous(), self._handle)
        self.stage = DispatcherStage.AFTER_COMBINE_A

    def combine_b(self) -> Tensor:
        self.stage.expect(DispatcherStage.AFTER_COMBINE_A)
        combined = self._combined
        del self._combined, self._output, self._handle
        self.stage = DispatcherStage.INITIAL
        return combined
