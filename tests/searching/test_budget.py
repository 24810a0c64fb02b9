"""The solver against every choice there is."""

from __future__ import annotations

import itertools
import random

import pytest

from pymllm.searching.budget import Option, least_bits, most_bits, solve


def random_weights(seed: int, count: int = 5, options: int = 4) -> list[list[Option]]:
    chance = random.Random(seed)
    return [
        [Option(chance.randint(1, 40), chance.choice([0.0, chance.random()])) for _ in range(options)]
        for _ in range(count)
    ]


def least_harm(weights: list[list[Option]], budget: int) -> float:
    every = itertools.product(*weights)
    return min(sum(o.harm for o in one) for one in every if sum(o.bits for o in one) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_a_choice_is_within_the_budget_and_next_to_the_best_of_all(seed):
    weights = random_weights(seed)
    low, high = least_bits(weights), most_bits(weights)
    for budget in sorted({low, (3 * low + high) // 4, (low + high) // 2, high, high + 50}):
        found = solve(weights, budget)
        best = least_harm(weights, budget)
        assert found.bits == sum(o[k].bits for o, k in zip(weights, found.picks, strict=True)) <= budget
        assert found.harm == pytest.approx(sum(o[k].harm for o, k in zip(weights, found.picks, strict=True)))
        assert found.bound <= best + 1e-9 <= found.harm + 2e-9
        # At most one step of one weight is lost.
        assert found.harm - found.bound <= max(max(o.harm for o in options) for options in weights) + 1e-9
        assert found == solve(weights, budget)


def test_at_the_budget_where_a_step_ends_the_choice_is_the_best():
    weights = [[Option(2, 1.0), Option(4, 0.1), Option(8, 0.0)], [Option(2, 0.5), Option(4, 0.3)]]
    assert [solve(weights, bits).picks for bits in (4, 6, 8, 12)] == [(0, 0), (1, 0), (1, 1), (2, 1)]


def test_a_budget_below_the_least_has_no_choice():
    weights = random_weights(1)
    assert solve(weights, least_bits(weights) - 1) is None
    assert solve(weights, least_bits(weights)) is not None


def test_ties_go_to_fewer_bits():
    assert solve([[Option(8, 0.25), Option(4, 0.25), Option(4, 0.25)]], 100).picks == (1,)
