"""Tokens of a batch: those that want the likeliest one get it together."""

import pytest
import torch

from pymllm import SamplingParams
from pymllm.engine.sampling import CANDIDATES, SamplerState, likeliest, sample
from pymllm.errors import KernelError


def states(*params):
    return [SamplerState(p, [1, 2]) for p in params]


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (3, 1000), (8, 32000)])
def test_greedy_requests_get_the_first_of_the_highest_logits(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)).round()  # many are equal
    found = likeliest(logits, states(*[SamplingParams()] * shape[0]))
    assert found == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.7, "seed": 3},
        {"logprobs": 2},
        {"logit_bias": ((5, 100.0),)},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
    ],
)
def test_a_request_that_wants_more_is_left_out(other):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    found = likeliest(logits, states(SamplingParams(), SamplingParams(**other), SamplingParams()))
    assert found == [int(logits[0].argmax()), None, int(logits[2].argmax())]
    assert likeliest(logits[:1], states(SamplingParams(**other))) == [None]


def allowed(logits, params):
    """The tokens that the cuts leave, one after the other, in float64."""
    values = logits.double() / params.temperature
    if params.top_k:
        values[values < values.sort(descending=True).values[params.top_k - 1]] = -torch.inf
    if params.min_p:
        values[values.softmax(-1) < params.min_p * values.softmax(-1).max()] = -torch.inf
    tokens, mass = set(), 0.0
    for token in values.argsort(descending=True, stable=True).tolist():
        if mass >= params.top_p or values[token] == -torch.inf:
            break
        tokens.add(token)
        mass += float(values.softmax(-1)[token])
    return tokens


@pytest.mark.parametrize("spread", (0.5, 4.0))
@pytest.mark.parametrize(
    "cuts", ({}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.6}, {"top_k": 9, "min_p": 0.01, "top_p": 0.9})
)
def test_tokens_are_drawn_from_those_that_the_cuts_leave_by_their_probabilities(cuts, spread):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * spread
    params = SamplingParams(temperature=0.8, seed=1, **cuts)
    state, tokens = SamplerState(params, []), sorted(allowed(logits, params))
    drawn = torch.tensor([sample(logits, state, [])[0] for _ in range(4000)])
    assert set(drawn.tolist()) <= set(tokens)
    expected = (logits.double()[tokens] / 0.8).softmax(-1) * 4000
    counts = torch.tensor([int((drawn == token).sum()) for token in tokens])
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt() + 3).all())


@pytest.mark.parametrize("top_p", (0.3, 0.999))
def test_a_flat_distribution_needs_more_than_the_first_candidates(top_p):
    logits = torch.linspace(0, 0.01, 6 * CANDIDATES)
    state = SamplerState(SamplingParams(temperature=1.0, top_p=top_p, seed=2), [])
    drawn = [sample(logits, state, [])[0] for _ in range(300)]
    least = len(logits) - round(top_p * len(logits)) - 0.01 * len(logits)
    assert least <= min(drawn) and max(drawn) > len(logits) * 0.98
    assert len({token * 6 // len(logits) for token in drawn}) == round(6 * top_p)


def test_logits_that_are_not_numbers_are_an_error():
    state = SamplerState(SamplingParams(temperature=1.0), [])
    with pytest.raises(KernelError, match="not numbers"):
        sample(torch.full((9,), torch.nan), state, [])
