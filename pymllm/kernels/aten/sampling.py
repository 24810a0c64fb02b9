"""Sampling in torch operations, all rows at once, on any device: the reference of the other kernels."""

# R rows, V vocabulary, N likeliest tokens

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm.kernels.copies import is_separate, upload
from pymllm.kernels.sampling import LEAST_EXPONENT, PIECE, SETTINGS, SamplingBatch, SamplingProblem

# A temperature's inverse is at most this: 0 times it is 0, and it is a float32.
LARGEST_SCALE = 3e38

# SplitMix64's constants as signed integers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIXERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class TorchSampling:
    """Sampling, every step of it one torch operation over all rows; steps that no row asks for are left out."""

    name = "torch"

    def why_not(self, problem: SamplingProblem) -> str | None:
        return None

    def choose(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return self._sample(logits, batch, False)[0]

    def propose(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        tokens, chances = self._sample(logits, batch, True)
        return tokens, torch.where(tokens < 0, torch.nan, chances)

    def _sample(self, logits: Tensor, batch: SamplingBatch, with_chances: bool) -> tuple[Tensor, Tensor]:
        """Choose a token of each row.  Returns [R] int64, and [R] float64, which hold chances only if wanted."""
        # What no row asks for is known without a copy from the device.
        asked = dict(zip(SETTINGS, batch.settings.numpy().T, strict=True))
        settings, *edits = upload(
            [
                batch.settings,
                *(_row_of_each(batch.bias_starts), batch.bias_tokens, batch.bias_values),
                *(_row_of_each(batch.seen_starts), batch.seen_tokens, batch.seen_counts),
            ],
            logits.device,
        )
        column = {name: settings[:, index, None] for index, name in enumerate(SETTINGS)}
        values = _edited(logits.detach().float(), edits, column)
        highest, likeliest = values.max(-1, keepdim=True)
        first = _first(values, highest, likeliest)
        # Of the likeliest token of a row that is not drawn.
        chances = highest.new_zeros(highest.shape, dtype=torch.float64)
        if with_chances:
            chances = 1 / (values - highest).exp().sum(-1, keepdim=True, dtype=torch.float64)
        if not (asked["temperature"] > 0).any():
            return torch.where(highest.isfinite(), first, -1).squeeze(-1), chances.squeeze(-1)
        scale = (1 / column["temperature"]).clamp(max=LARGEST_SCALE).float()
        x = (values - highest) * scale
        vocabulary = values.shape[-1]
        least = torch.full_like(highest, LEAST_EXPONENT)
        if (asked["min_p"] > 0).any():
            least = torch.maximum(least, column["min_p"].log().float())
        cut = asked["top_k"][(asked["top_k"] > 0) & (asked["top_k"] < vocabulary)]
        if len(cut):
            most = int(cut.max())
            best = x.topk(most, dim=-1).values
            place = (column["top_k"].long() - 1).clamp(0, most - 1)
            kth = best.gather(-1, place)
            cuts_k = (column["top_k"] > 0) & (column["top_k"] < vocabulary)
            least = torch.where(cuts_k, torch.maximum(least, kth), least)
        # NaN stays out, too: whatever row has it gets no token.
        weights = torch.where(x >= least, x.exp(), 0.0).double()
        if (asked["top_p"] < 1).any():
            weights = _cut_top_p(x, weights, column["top_p"])
        if (asked["typical_p"] < 1).any():
            weights = _cut_typical(x, weights, column["typical_p"])
        draws, drawn = column["temperature"] > 0, _draw(weights, column["number"])
        if with_chances:
            drawn = drawn.clamp(max=vocabulary - 1)  # of a row of NaN, pieces are filled up
            chances = torch.where(draws, weights.gather(-1, drawn) / weights.sum(-1, keepdim=True), chances)
        tokens = torch.where(draws, drawn, first)
        return torch.where(highest.isfinite(), tokens, -1).squeeze(-1), chances.squeeze(-1)

    def log_probabilities(self, logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        values = logits.detach().float()
        highest = values.amax(-1, keepdim=True)
        total = (values - highest).exp().sum(-1, keepdim=True, dtype=torch.float64).log() + highest
        chosen = values.gather(-1, tokens.to(values.device)[:, None]) - total
        ordered = values.sort(dim=-1, descending=True, stable=True) if count else None
        best = (
            values.new_empty((len(values), 0), dtype=torch.int64)
            if ordered is None
            else ordered.indices[:, :count]
        )
        fine = highest.isfinite()
        top = torch.where(fine, values.gather(-1, best) - total, torch.nan)
        return (
            torch.where(fine, chosen, torch.nan).squeeze(-1).float(),
            torch.where(fine, best, 0),
            top.float(),
        )


def _draw(weights: Tensor, number: Tensor) -> Tensor:
    """Draw a token of each row by two races.  weights: [R, V]; number: [R, 1].  Returns [R, 1]."""
    pieces = F.pad(weights, (0, -weights.shape[-1] % PIECE)).unflatten(-1, (-1, PIECE))
    index = torch.arange(pieces.shape[1], device=weights.device).expand(len(weights), -1)
    piece = _arrivals(index, pieces.sum(-1), number, 1).argmin(-1, keepdim=True)
    within = piece * PIECE + torch.arange(PIECE, device=weights.device)
    chances = pieces.gather(1, piece.unsqueeze(-1).expand(-1, -1, PIECE)).squeeze(1)
    return within.gather(-1, _arrivals(within, chances, number, 2).argmin(-1, keepdim=True))


def _arrivals(index: Tensor, weight: Tensor, number: Tensor, what: int) -> Tensor:
    """Return when each entrant arrives, infinity without a weight.  index, weight: [R, N]; number: [R, 1]."""
    state = _mixed((number * 2**53).long() * 4 + what)
    mixed = _mixed(state + (index + 1) * GOLDEN)
    u = (_shifted(mixed, 11).double() + 0.5) * 2.0**-53
    return torch.where(weight > 0, -u.log() / weight, torch.inf)


def _mixed(z: Tensor) -> Tensor:
    """Spread 64 bits, by SplitMix64's finaliser; int64 products wrap as unsigned ones do."""
    z = (z ^ _shifted(z, 30)) * MIXERS[0]
    z = (z ^ _shifted(z, 27)) * MIXERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right without the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _first(values: Tensor, highest: Tensor, likeliest: Tensor) -> Tensor:
    """Return the first of the highest values of each row, [R, 1]; on a GPU, `max` may return another."""
    return (values == highest).int().argmax(-1, keepdim=True) if is_separate(values.device) else likeliest


def _edited(values: Tensor, edits: Sequence[Tensor], column: dict[str, Tensor]) -> Tensor:
    """Return the logits with biases and penalties, [R, V], a copy if there are any.

    edits: the row, the token and the value of each bias, then of each seen token, on the logits' device.
    """
    rows, tokens, biases = edits[:3]
    if tokens.numel():
        values = values.index_put((rows, tokens), biases, accumulate=True)
    rows, tokens, counts = edits[3:]
    if tokens.numel():
        counts = counts.double()
        penalty, frequency, presence = (
            column[f"{name}_penalty"].squeeze(-1)[rows] for name in ("repetition", "frequency", "presence")
        )
        seen = values[rows, tokens].double()
        seen = seen * torch.where(seen > 0, 1 / penalty, penalty) - (
            frequency * counts + presence * (counts > 0)
        )
        values = values.index_put((rows, tokens), seen.float())
    return values


def _row_of_each(starts: Tensor) -> Tensor:
    counts = np.diff(starts.numpy())
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def _cut_top_p(x: Tensor, weights: Tensor, top_p: Tensor) -> Tensor:
    """Set the weights of tokens to 0 that come after `top_p` of the whole weight.  All [R, V], top_p [R, 1]."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    kept = _before(weights.gather(-1, order)) < _mass(top_p, weights)
    return torch.where(torch.zeros_like(kept).scatter_(-1, order, kept), weights, 0.0)


def _cut_typical(x: Tensor, weights: Tensor, typical_p: Tensor) -> Tensor:
    """Set the weights of the less typical tokens to 0.  All [R, V], typical_p [R, 1]."""
    total = weights.sum(-1, keepdim=True)
    information = torch.where(weights > 0, total.log() - x, torch.inf)  # in nats
    entropy = (weights / total * information).nan_to_num(0.0).sum(-1, keepdim=True)
    distance = (information - entropy).abs().float()
    order = distance.argsort(dim=-1, stable=True)
    kept = _before(weights.gather(-1, order)) < _mass(typical_p, weights)
    # The last one that is needed, and all that are as near.
    farthest = distance.gather(-1, order).masked_fill(~kept, -torch.inf).amax(-1, keepdim=True)
    return torch.where((distance <= farthest) | (typical_p >= 1), weights, 0.0)


def _before(weights: Tensor) -> Tensor:
    """Return the weight before each token."""
    return F.pad(weights.cumsum(-1)[:, :-1], (1, 0))


def _mass(share: Tensor, weights: Tensor) -> Tensor:
    """Return so much of each row's weight, [R, 1]; infinity where the share is all, whatever rounding does."""
    return torch.where(share < 1, share * weights.sum(-1, keepdim=True), torch.inf)
