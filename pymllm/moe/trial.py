"""The check of a layer's experts against float64."""

# E experts held here, N test rows, H hidden size, O out_features, I in_features

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm.layers.held import TRIAL_ROWS, HeldWeight, Trial
from pymllm.quantization.converted import ConvertedLinearMethod

if TYPE_CHECKING:
    from pymllm.moe.experts import Experts

# Of inputs. A gate times an up squares them: about 200, as for linear layers, which f16 holds.
MAGNITUDES = {"ordinary": 1.0, "large": 14.0}


def experts_trial(experts: Experts, stored: Callable[[HeldWeight], Mapping[str, Tensor]]) -> Trial:
    """Make the check of these experts: of every packed weight, and of each expert's answers to rows routed to it alone.

    stored: reads a product's tensors, [E, ...] each, from the checkpoint again.
    """
    bound = experts.bound
    assert bound is not None
    problem = bound.problem
    # In float32, which is far closer than any tolerance, at half the size of float64.
    kept: dict[str, list[Tensor]] = {}

    def weights() -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        packed = bound.canonical().products()
        for held, (name, product) in zip(experts.held(), experts.products_of().items(), strict=True):
            tensors, method = stored(held), product.quant_method
            originals = product.canonical(tensors, method.source_method())
            decoded = zip(product.canonical(tensors), originals, packed[name], strict=True)
            for expected, original, found in decoded:
                wanted = expected.dequantize(torch.float64)
                converts = isinstance(method, ConvertedLinearMethod)
                kept.setdefault(name, []).append(wanted.float())
                yield (
                    wanted,
                    original.dequantize(torch.float64) if converts else None,
                    found.dequantize(torch.float64).cpu(),
                )

    def answer(generator: torch.Generator, magnitude: float) -> tuple[Tensor, Tensor]:
        device, ids = problem.device.torch_device, torch.arange(problem.num_experts)
        # Every expert has rows of its own.
        ids = ids.repeat_interleave(TRIAL_ROWS).unsqueeze(-1)
        x = torch.randn((len(ids), problem.down.out_features), generator=generator) * magnitude
        x = x.to(problem.dtype)
        got = bound.run(x.to(device), ids.to(device), torch.ones(ids.shape, device=device), experts.bias())
        return got, _answers(kept, experts, x.double().unflatten(0, (-1, TRIAL_ROWS)))

    described = experts.quant_method.describe()
    return Trial(experts.prefix, "experts", described, bound, weights(), MAGNITUDES, answer)


def _answers(weights: Mapping[str, list[Tensor]], experts: Experts, rows: Tensor) -> Tensor:
    """Compute each expert's answers by the plain formula.  rows: [E, N, H] float64.  Returns [E·N, H]."""
    bias, answers = experts.bias(), []
    for expert, x in enumerate(rows):
        first = [x @ weights[name][expert].double().t() for name in weights if name != "down"]
        hidden = torch.cat(first, dim=-1)
        if bias.gate_up is not None:
            hidden = hidden + bias.gate_up[expert].double().cpu()
        y = experts.activation(hidden) @ weights["down"][expert].double().t()
        answers.append(y if bias.down is None else y + bias.down[expert].double().cpu())
    return torch.cat(answers)
