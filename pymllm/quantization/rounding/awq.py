"""AWQ: two searches before int4 weights are rounded, for the least error of outputs on inputs that layers really see.

`search_scales` finds a factor for each input channel. It is multiplied into the weights and divided out of whatever
makes the inputs, so that it changes nothing but the errors of rounding. `round_with_clipping` finds how far to cut the
range of each group.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", https://arxiv.org/abs/2306.00978.
"""

# N rows of inputs, I in_features, O out_features, G group_size

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymllm.kernels.canonical import IntWeight

SCALE_EXPONENTS = [step / 10 for step in range(11)]
RANGE_FACTORS = [1.0 - step / 16 for step in range(6)]
LEAST = 1e-4  # the least mean magnitude of a channel, so that one which is never used gets no extreme factor


def candidate_scales(inputs: Tensor, weights: Sequence[Tensor], group_size: int) -> list[Tensor]:
    """List the scales [I] to try for inputs [N, I] and weights [O, I]: a^x and a^x / w^(1 - x), x in SCALE_EXPONENTS.

    a: a channel's mean magnitude.  w: its mean share of the largest weight of its group.  a^0 is no scaling.
    """
    activity = inputs.abs().mean(0).clamp(min=LEAST)
    groups = torch.cat(list(weights)).abs().unflatten(1, (-1, group_size))
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(1).mean(0).clamp(min=LEAST)
    candidates = [activity**x for x in SCALE_EXPONENTS] + [
        activity**x / share ** (1 - x) for x in SCALE_EXPONENTS
    ]
    return [scales / (scales.max() * scales.min()).sqrt() for scales in candidates]


def search_scales(
    weights: Sequence[Tensor],
    inputs: Tensor,
    run: Callable[[], Tensor],
    rounded: Sequence[Callable[[Tensor], Tensor]],
    group_size: int,
) -> Tensor:
    """Find the scales [I] with which rounding disturbs the output of `run` least.

    weights: [O, I] each, of layers that share `inputs` [N, I]; written to meanwhile, and as they were at the end.
    run: computes the output to keep from them.  rounded: for each weight, what gives its value after quantisation.
    """
    originals = [weight.clone() for weight in weights]
    reference = run()

    def error_with(scales: Tensor) -> float:
        for weight, original, quantise in zip(weights, originals, rounded, strict=True):
            weight.copy_(quantise(original * scales) / scales)
        return float((run() - reference).square().mean())

    best = min(candidate_scales(inputs, originals, group_size), key=error_with)
    for weight, original in zip(weights, originals, strict=True):
        weight.copy_(original)
    return best


def grams_of(inputs: Tensor, group_size: int) -> Tensor:
    """Multiply each group's inputs with one another: [N, I] -> [I/G, G, G]."""
    groups = inputs.unflatten(1, (-1, group_size)).transpose(0, 1)  # [I/G, N, G]
    return groups.transpose(1, 2) @ groups


def round_with_clipping(
    weight: Tensor, grams: Tensor, *, bits: int, group_size: int, symmetric: bool
) -> IntWeight:
    """Round a weight [O, I] float32 to nearest, with each group's range cut to where its error on the inputs is least.

    grams: [I/G, G, G], as `grams_of` makes them.
    """

    def rounded(low: Tensor | float, high: Tensor | float) -> IntWeight:
        return IntWeight.from_float(
            weight, bits=bits, group_size=group_size, symmetric=symmetric, range_factors=(low, high)
        )

    least_error = torch.full((weight.shape[0], grams.shape[0]), torch.inf)  # [O, I/G]
    best_low, best_high = torch.ones_like(least_error), torch.ones_like(least_error)
    for low, high in itertools.product(RANGE_FACTORS, repeat=2):
        if symmetric and low != high:
            continue
        change = rounded(low, high).dequantize(torch.float32) - weight
        change = change.unflatten(1, (-1, group_size)).transpose(0, 1)  # [I/G, O, G]
        error = ((change @ grams) * change).sum(-1).T
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best_low[better], best_high[better] = low, high
    return rounded(best_low, best_high)
