"""The experts of a layer in plain float32, one after the other: what runs while they are calibrated."""

# T tokens, K experts a token, H hidden size, I in_features, O out_features

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.errors import ConfigError
from pymllm.moe.experts import Experts


class FloatExperts:
    """A stand-in for an `Experts` module's forward, until it is closed.

    weights: [O, I] zeros by the checkpoint's names, to be filled.  rounds: names, in the order in which they run.
    seen: a dict to have each layer's inputs recorded in, or None.  product: multiplies inputs [*, I] by the weight of
    a name; another function may take its place, to look at what it multiplies.
    ConfigError for experts that the checkpoint stores all in one tensor.
    """

    def __init__(self, module: Experts) -> None:
        if module.layout.stacked:
            raise ConfigError(
                "the experts of a layer lie in one tensor, and calibration cannot run through such experts",
                code="calibration",
                tensor=module.prefix,
                fix="Quantise without --calibrate.",
            )
        self.module = module
        self.weights: dict[str, Tensor] = {}
        for part in module.parts():
            self.weights[part.name] = torch.zeros(part.shape.out_features, part.shape.in_features)
        parts = module.layout.parts()
        gate_up, (down,) = parts["gate_up"], parts["down"]
        self.names = {e: ([part.format(e) for part in gate_up], down.format(e)) for e in module.ids}
        first = [name for names, _ in self.names.values() for name in names]
        self.rounds = [first, [last for _, last in self.names.values()]]
        self.seen: dict[str, Tensor] | None = None
        self.product: Callable[[str, Tensor], Tensor] = self.multiply
        module.forward = self.forward  # type: ignore[method-assign]

    def close(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward

    def multiply(self, name: str, x: Tensor) -> Tensor:
        """Multiply x [*, I] by the weight of this name.  Returns [*, O]."""
        return x @ self.weights[name].t()

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Run the experts as `Experts.forward` does.

        x: [T, H]; topk_ids: [T, K]; topk_weights: [T, K] float32.  Returns [T, H].
        """
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in self.names.items():
            rows, place = (topk_ids == expert).nonzero(as_tuple=True)
            if not rows.numel():
                continue
            mine = x[rows]
            hidden = self.module.activation(torch.cat([self.product(n, mine) for n in gate_up], dim=-1))
            if self.seen is not None:
                self.seen |= {**dict.fromkeys(gate_up, mine), down: hidden}
            y.index_add_(0, rows, self.product(down, hidden) * topk_weights[rows, place].unsqueeze(1))
        return y
