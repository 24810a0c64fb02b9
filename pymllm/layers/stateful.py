"""A layer whose states are tensors: room for every request's, copies of them, and which begin with this step."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionStep
from pymllm.layers.held import WeightHolder
from pymllm.quantization.kv_cache import zeros


class StatefulLayer(WeightHolder):
    """A layer that keeps float32 tensors of fixed shapes for each request.

    A layer of this kind says its shapes in `state_shapes`, and hands `states` to kernels, which write to them in place.
    states: [slots, *shape] each; (): nothing is kept.
    """

    copies_states: ClassVar[bool] = True
    states: tuple[Tensor, ...] = ()

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of one request's tensors."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Return the bytes of one request's tensors."""
        return sum(self.shape_bytes())

    def shape_bytes(self) -> list[int]:
        """Return the bytes of each of one request's tensors."""
        return [math.prod(shape) * torch.float32.itemsize for shape in self.state_shapes()]

    def states_in(self, step: AttentionStep) -> tuple[Tensor | None, ...]:
        """Return the states as the kernels of a step take them: None each where nothing is kept."""
        return self.states if step.state_slots is not None else (None,) * len(self.state_shapes())

    def attach_states(self, count: int, device: torch.device) -> None:
        """Make the tensors of `count` requests."""
        self.states = tuple(zeros((count, *shape), torch.float32, device) for shape in self.state_shapes())

    def detach_states(self) -> None:
        """Take the tensors away."""
        self.states = ()

    def save_states(self, slots: Tensor) -> list[Tensor]:
        """Copy the states in `slots`, [R] int64.  Returns [R, *shape] of each tensor."""
        return [state[slots] for state in self.states]

    def restore_states(self, slots: Tensor, saved: Any) -> None:
        """Put copies that `save_states` made into `slots`, [R] int64."""
        for state, copies in zip(self.states, saved, strict=True):
            state[slots] = copies
