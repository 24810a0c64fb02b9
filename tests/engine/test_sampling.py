"""Tokens of a batch: those that want the likeliest one get it together."""

import pytest
import torch

from pymllm import SamplingParams
from pymllm.engine.sampling import SamplerState, likeliest


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
