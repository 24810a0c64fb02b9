"""The gated activation of experts, between their two products: a gate half and an up half become one."""

# N half the gated size

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.errors import ConfigError, choices, nearest


@dataclass(frozen=True)
class GatedActivation:
    """A gated activation, applied to rows of gate and up.

    kind: silu, gelu_tanh: act(gate) * up; swiglu: gate * sigmoid(alpha * gate) * (up + 1), as gpt_oss has it.
    limit: swiglu clamps its gate above it, and its up beyond it on either side.
    """

    kind: Literal["silu", "gelu_tanh", "swiglu", "other"] = "silu"
    alpha: float = 1.0
    limit: float = float("inf")

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Apply it to gate_up, [*, 2N], gate first.  Returns [*, N]."""
        gate, up = gate_up.chunk(2, dim=-1)
        if self.kind == "silu":
            return F.silu(gate) * up
        if self.kind == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def __str__(self) -> str:
        return self.kind if self.kind != "swiglu" else f"swiglu alpha {self.alpha} limit {self.limit}"


@dataclass(frozen=True)
class OtherActivation(GatedActivation):
    """An activation that is a function alone: kernels that cannot call it between two products refuse it.

    function: [*, 2N], gate first, or [*, N] where there is no gate -> [*, N].  name: for people.
    """

    kind: Literal["other"] = "other"
    function: Callable[[Tensor], Tensor] = F.silu
    name: str = "other"

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(gate_up)

    def __str__(self) -> str:
        return self.name


# By the names in configs, some of which mean the same formula.
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new", "gelu_fast")
ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), GatedActivation("silu")),
    **dict.fromkeys(_GELU_TANH, GatedActivation("gelu_tanh")),
}


def activation_of(hidden_act: Any) -> GatedActivation:
    """Find the activation that a config names as hidden_act.  ConfigError "config-value" for an unknown name."""
    if not isinstance(hidden_act, str) or hidden_act not in ACTIVATIONS:
        raise ConfigError(
            f"config.json names an activation that pymllm does not have, {hidden_act!r}",
            code="config-value",
            file="config.json",
            tensor="hidden_act",
            expected=choices(ACTIVATIONS, hidden_act),
            found=repr(hidden_act),
            fix=nearest(str(hidden_act), ACTIVATIONS),
        )
    return ACTIVATIONS[hidden_act]
