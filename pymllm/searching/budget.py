"""The choice of one option for each weight: the least harm within a number of bits.

This is the multiple-choice knapsack problem.  The options of a weight on its convex hull (harm over bits) are steps,
each a gain in harm for so many bits.  All steps of all weights, best first, give the optimum at each budget where
a step ends; between two of these, what is left is spent on what still fits, and pairs are exchanged while that helps.
The hull also gives a bound: no choice within the budget has less harm.
"""

# N weights, K options of a weight

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One method for one weight.  bits: that it takes.  harm: that it does, in nats a token."""

    bits: int
    harm: float


@dataclass(frozen=True)
class Choice:
    """The option of each weight, by its index.  bound: the harm below which no choice of these bits can be."""

    picks: tuple[int, ...]
    bits: int
    harm: float
    bound: float


def solve(weights: Sequence[Sequence[Option]], budget: int) -> Choice | None:
    """Choose an option for each weight, so that the harm is least and the bits are `budget` at most.

    The same input gives the same choice: ties go to fewer bits, then to what comes first.
    Returns None if the options of fewest bits take more than the budget.
    """
    hulls = [_hull(options) for options in weights]
    picks = [hull[0] for hull in hulls]
    left = budget - sum(options[pick].bits for options, pick in zip(weights, picks, strict=True))
    if left < 0:
        return None
    steps = []
    for index, (options, hull) in enumerate(zip(weights, hulls, strict=True)):
        for before, after in itertools.pairwise(hull):
            cost = options[after].bits - options[before].bits
            steps.append(((options[before].harm - options[after].harm) / cost, index, after, cost))
    steps.sort(key=lambda step: (-step[0], step[1]))
    bound = sum(options[pick].harm for options, pick in zip(weights, picks, strict=True))
    full = False
    stopped: set[int] = set()  # a weight's steps only come one after another
    for rate, index, after, cost in steps:
        if not full:
            bound -= rate * min(cost, left)
            full = cost > left
        if index not in stopped and cost <= left:
            picks[index], left = after, left - cost
        else:
            stopped.add(index)
    left = _spend(weights, picks, left)
    while (gained := _exchange(weights, picks, left)) is not None:
        left = _spend(weights, picks, gained)
    harm = sum(options[pick].harm for options, pick in zip(weights, picks, strict=True))
    return Choice(tuple(picks), budget - left, harm, max(bound, 0.0))


def least_bits(weights: Sequence[Sequence[Option]]) -> int:
    """Return the fewest bits that any choice takes."""
    return sum(min(option.bits for option in options) for options in weights)


def most_bits(weights: Sequence[Sequence[Option]]) -> int:
    """Return the bits beyond which no more harm can be saved."""
    return sum(options[_hull(options)[-1]].bits for options in weights)


def _hull(options: Sequence[Option]) -> list[int]:
    """List the options that are best at some price of a bit, from the fewest bits up, with less and less harm."""
    order = sorted(range(len(options)), key=lambda k: (options[k].bits, options[k].harm, k))
    hull: list[int] = []
    for k in order:
        if hull and options[k].harm >= options[hull[-1]].harm:
            continue
        while len(hull) > 1 and _rate(options, hull[-2], hull[-1]) <= _rate(options, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _rate(options: Sequence[Option], before: int, after: int) -> float:
    """Return the harm that a bit saves between two options."""
    return (options[before].harm - options[after].harm) / (options[after].bits - options[before].bits)


def _spend(weights: Sequence[Sequence[Option]], picks: list[int], left: int) -> int:
    """Take what still fits, the largest saving first, options off the hull too.  Returns the bits that are left."""
    while True:
        best: tuple[float, int, int] | None = None
        for index, options in enumerate(weights):
            now = options[picks[index]]
            for k, option in enumerate(options):
                saving = now.harm - option.harm
                if option.bits - now.bits <= left and saving > 0 and (best is None or saving > best[0]):
                    best = saving, index, k
        if best is None:
            return left
        _, index, k = best
        left -= weights[index][k].bits - weights[index][picks[index]].bits
        picks[index] = k


def _exchange(weights: Sequence[Sequence[Option]], picks: list[int], left: int) -> int | None:
    """Give one weight fewer bits and another more, where that saves harm.  Returns the bits left, or None.

    The exchange that saves most is made.  Rises are sorted by bits, with the best saving up to each, so that the
    N·K falls find theirs in turn.
    """
    falls, rises = [], []
    for index, options in enumerate(weights):
        now = options[picks[index]]
        for k, option in enumerate(options):
            if option.bits < now.bits:
                falls.append((now.bits - option.bits, option.harm - now.harm, index, k))
            elif option.bits > now.bits and option.harm < now.harm:
                rises.append((option.bits - now.bits, now.harm - option.harm, index, k))
    falls.sort()
    rises.sort(key=lambda rise: rise[0])
    best: tuple[float, int, int, int, int] | None = None
    leaders: list[tuple[float, int, int]] = []  # the largest savings so far, of two different weights
    place = 0
    for freed, loss, index, k in falls:
        while place < len(rises) and rises[place][0] <= freed + left:
            _, saving, other, choice = rises[place]
            leaders = _two_best([*leaders, (saving, other, choice)])
            place += 1
        leader = next((one for one in leaders if one[1] != index), None)
        if leader is not None and leader[0] - loss > max(1e-12, 0.0 if best is None else best[0]):
            best = leader[0] - loss, index, k, leader[1], leader[2]
    if best is None:
        return None
    for index, k in (best[1:3], best[3:5]):
        left -= weights[index][k].bits - weights[index][picks[index]].bits
        picks[index] = k
    return left


def _two_best(leaders: list[tuple[float, int, int]]) -> list[tuple[float, int, int]]:
    """Keep the best of the leaders, and the best one of another weight."""
    leaders.sort(key=lambda one: (-one[0], one[1], one[2]))
    first = leaders[0]
    return [first, *[one for one in leaders if one[1] != first[1]][:1]]
