"""A layer whose output depends on all tokens before, by a state: what the engine must keep for it is easy to see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pymllm.kernels.attention import AttentionStep
from pymllm.layers.stateful import StatefulLayer
from pymllm.layers.step import fetch_attn_metadata


class Trailing(StatefulLayer):
    """inner(x + 0.3 s), where s is 0.8 times the s of the token before, plus x.

    freed: the slots that were given back, in order.  break_if: raises in a step after the state has been written.
    """

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size
        self.freed: list[int] = []
        self.break_if: Callable[[AttentionStep], bool] | None = None

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.size,),)

    def free_state(self, slot: int) -> None:
        self.freed.append(slot)

    def forward(self, x: Tensor) -> Tensor:
        step = fetch_attn_metadata()
        slots = step.state_slots
        if slots is not None and step.max_seqlen_q == 1:
            (state,) = self.states
            trail = state[slots].masked_fill((step.context_lens == 1)[:, None], 0) * 0.8 + x
            state[slots] = trail
        else:
            trail = torch.empty_like(x)
            for request, (start, stop, length) in enumerate(step.spans):
                now = torch.zeros(self.size)
                if length > stop - start:
                    now = self.states[0][slots[request]]
                for token in range(start, stop):
                    now = now * 0.8 + x[token]
                    trail[token] = now
                if slots is not None:
                    self.states[0][slots[request]] = now
        if self.break_if is not None and self.break_if(step):
            raise RuntimeError("broken on purpose")
        return self.inner(x + 0.3 * trail)


def with_states(llm):
    """Put such a layer around every MLP of a model that has not run yet.  Returns the model."""
    for layer in llm.model.model.layers:
        layer.mlp = Trailing(layer.mlp, llm.config.size("hidden_size"))
    return llm


def trails(llm) -> list[Trailing]:
    return [module for module in llm.model.modules() if isinstance(module, Trailing)]
