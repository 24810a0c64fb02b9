"""The choice of the next tokens of a step: the settings of its requests become one batch, and one kernel chooses."""

# R requests, V vocabulary

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pymllm.engine.sampling import SamplingParams
from pymllm.errors import KernelError, RequestError
from pymllm.kernels.copies import is_separate, receive, upload
from pymllm.kernels.sampling import SETTINGS, SamplingBatch, SamplingKernel
from pymllm.text.grammars import Matcher

BANNED = float("-inf")

_MASK = 2**64 - 1


@dataclass(frozen=True)
class TokenLogprobs:
    """The model's log-probability of the chosen token, and of the likeliest few, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def uniform(seed: int, position: int) -> float:
    """Make the random number of one place of one request, in [0, 1), from nothing but these two.

    Both go through SplitMix64's finaliser (Steele, Lea, Flood 2014), which passes BigCrush as a generator: the seed
    first, so that requests with seeds side by side have nothing in common.
    """
    return (_mixed(_mixed(seed & _MASK) + (position + 1) * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class SeenTokens:
    """The tokens of a text, each once, and how often its answer has each; it follows a growing answer."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.tokens = array("q", dict.fromkeys(prompt))
        self.counts = array("f", bytes(4 * len(self.tokens)))
        self._place = {token: place for place, token in enumerate(self.tokens)}
        self._read = 0

    def follow(self, answer: Sequence[int]) -> SeenTokens:
        """Count the tokens that the answer has got since."""
        for token in answer[self._read :]:
            place = self._place.setdefault(token, len(self.tokens))
            if place == len(self.tokens):
                self.tokens.append(token)
                self.counts.append(0.0)
            self.counts[place] += 1.0
        self._read = len(answer)
        return self

    def ahead(self, drafts: Sequence[int]) -> tuple[array[Any], array[Any]]:
        """Return copies of the tokens and counts as they would be after these tokens, too."""
        tokens, counts = self.tokens[:], self.counts[:]
        new: dict[int, int] = {}
        for token in drafts:
            place = self._place.get(token, new.get(token))
            if place is None:
                new[token] = place = len(tokens)
                tokens.append(token)
                counts.append(0.0)
            counts[place] += 1.0
        return tokens, counts


@dataclass
class SamplerState:
    """The state of a request's sampling that lasts from token to token.

    bad_words: token ids of what must not come.  ends: the tokens that must not come before min_tokens.
    matcher: the answer's place in its grammar; None: it follows none.
    takes_likeliest: `SamplingParams.takes_likeliest`, which is asked in every step.
    """

    params: SamplingParams
    prompt: list[int]
    bad_words: tuple[tuple[int, ...], ...] = ()
    ends: tuple[int, ...] = ()
    matcher: Matcher | None = None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.takes_likeliest = params.takes_likeliest
        self._settings = tuple(float(getattr(params, name)) for name in SETTINGS[:-1])
        tokens, values = _columns(params.logit_bias)
        self._bias = array("q", tokens), array("f", values)
        self._seen = (
            SeenTokens(self.prompt if params.repetition_penalty != 1.0 else ()) if params.penalises else None
        )

    def settings(self, answer: Sequence[int], drafts: Sequence[int] = ()) -> tuple[float, ...]:
        """Return the row of `SamplingBatch.settings` for the token after this answer, and what is drafted after it."""
        place = len(answer) + len(drafts)
        return (*self._settings, 0.0 if self.params.greedy else uniform(self.seed, place))

    def bias(self, answer: Sequence[int], drafts: Sequence[int] = ()) -> tuple[array[Any], ...]:
        """Return tokens and what is added to their logits."""
        banned = [*self.ends] if len(answer) + len(drafts) < self.params.min_tokens else []
        if drafts and self.bad_words:
            answer = [*answer, *drafts]
        for word in self.bad_words:
            if len(word) == 1 or self._tail(answer, len(word) - 1) == word[:-1]:
                banned.append(word[-1])
        if not banned:
            return self._bias
        tokens, values = self._bias
        return tokens + array("q", banned), values + array("f", [BANNED] * len(banned))

    def seen(self, answer: Sequence[int], drafts: Sequence[int] = ()) -> tuple[array[Any], ...]:
        """Return the tokens that penalties are for, and how often the answer has each."""
        if self._seen is None:
            return array("q"), array("f")
        self._seen.follow(answer)
        return self._seen.ahead(drafts) if drafts else (self._seen.tokens, self._seen.counts)

    def _tail(self, answer: Sequence[int], count: int) -> tuple[int, ...]:
        text = answer if len(answer) >= count else self.prompt[-count:] + list(answer)
        return tuple(text[-count:])


def choose(
    logits: Tensor,
    states: Sequence[SamplerState],
    answers: Sequence[Sequence[int]],
    kernel: SamplingKernel,
    drafts: Sequence[Sequence[int]] = (),
    masks: Mapping[int, Tensor] | None = None,
) -> list[tuple[int | None, TokenLogprobs | None]]:
    """Choose the next token of each row, and report log-probabilities where they are asked for.

    logits: [R, V].  answers: of each row's request, so far.  drafts: the tokens that would stand between that and the
    row's own; none, or some for each row.  masks: by row, what a grammar allows where it is known already, [V] bool.
    The token is None where the logits are not numbers. Log-probabilities are the model's own, before any setting.
    """
    if all([state.takes_likeliest for state in states]):
        return [(token, None) for token in _likeliest(logits)]
    batch = _batch(states, answers, drafts or [()] * len(states))
    tokens = kernel.choose(_allowed(logits, states, masks or {}), batch)
    counts = [state.params.logprobs for state in states]
    wanted = [row for row, count in enumerate(counts) if count is not None]
    if not wanted:
        return [(token if token >= 0 else None, None) for token in receive(tokens)]
    rows, chosen = logits, tokens.clamp(min=0)
    if len(wanted) < len(states):
        (index,) = upload([torch.tensor(wanted)], logits.device)
        rows, chosen = logits[index], chosen[index]
    parts = kernel.log_probabilities(rows, chosen, max(count for count in counts if count is not None))
    # One copy from the device; a token is exact in float64.
    flat = receive(torch.cat([part.double().flatten() for part in (tokens, *parts)]))
    found = [int(token) for token in flat[: len(states)]]
    described = _describe(flat[len(states) :], [found[row] for row in wanted])
    entries: list[tuple[int | None, TokenLogprobs | None]] = [
        (token if token >= 0 else None, None) for token in found
    ]
    for row, entry in zip(wanted, described, strict=True):
        if found[row] >= 0:
            entries[row] = (found[row], cut(entry, counts[row] or 0))
    return entries


def _allowed(logits: Tensor, states: Sequence[SamplerState], masks: Mapping[int, Tensor]) -> Tensor:
    """Return the logits with minus infinity for what grammars rule out, a copy where there are any."""
    matched = [(row, state.matcher) for row, state in enumerate(states) if state.matcher is not None]
    if not matched:
        return logits
    known = [masks[row] if row in masks else matcher.allowed() for row, matcher in matched]
    allowed, rows = upload([torch.stack(known), torch.tensor([row for row, _ in matched])], logits.device)
    return logits.index_put((rows,), torch.where(allowed, logits[rows], -torch.inf))


def describe(
    logits: Tensor, tokens: Sequence[int], count: int, kernel: SamplingKernel
) -> list[TokenLogprobs]:
    """Report the log-probabilities of the tokens that follow in a prompt, and of the `count` likeliest.

    logits: [R, V], one row for each of the tokens.  KernelError if they are not numbers.
    """
    (following,) = upload([torch.tensor(tokens)], logits.device)
    parts = kernel.log_probabilities(logits, following, count)
    flat = receive(torch.cat([part.double().flatten() for part in parts]))
    entries = _describe(flat, tokens)
    if any(entry.logprob != entry.logprob for entry in entries):
        raise no_numbers()
    return entries


def no_numbers() -> KernelError:
    """Make the error for a row from which no token can be chosen."""
    return KernelError(
        "no token can be chosen: the model's logits are not numbers, or every token is ruled out",
        code="logits-nan",
        expected="finite logits, and minus infinity for some",
        fix="Check the model with `pymllm verify`, or rule fewer tokens out.",
    )


def nothing_left() -> RequestError:
    """Make the error for a row of which a grammar, and what is ruled out beside it, leave nothing."""
    return RequestError(
        "the answer cannot go on: what may come next by its grammar is ruled out by bad_words or min_tokens",
        code="grammar",
        tensor="bad_words",
        fix="Rule fewer tokens out.",
    )


def _describe(flat: list[float], tokens: Sequence[int]) -> list[TokenLogprobs]:
    """Read the three results of `log_probabilities`, one behind the other."""
    rows = len(tokens)
    count = (len(flat) // rows - 1) // 2 if rows else 0
    best, values = flat[rows : rows + rows * count], flat[rows + rows * count :]
    return [
        TokenLogprobs(
            token,
            flat[row],
            tuple((int(best[at]), values[at]) for at in range(row * count, (row + 1) * count)),
        )
        for row, token in enumerate(tokens)
    ]


def cut(entry: TokenLogprobs, count: int) -> TokenLogprobs:
    """Leave the `count` likeliest tokens of an entry that may have more."""
    return (
        entry if len(entry.top) <= count else TokenLogprobs(entry.token_id, entry.logprob, entry.top[:count])
    )


def _likeliest(logits: Tensor) -> list[int | None]:
    """Take the first of the highest logits of each row; None where the highest is no number."""
    if not is_separate(logits.device):
        # NumPy's argmax takes a tenth of the time of torch's.
        rows = logits.detach().float().numpy()
        tokens = rows.argmax(-1)
        highest = rows[range(len(rows)), tokens].tolist()
        found = tokens.tolist()
    else:
        index = logits.argmax(-1, keepdim=True)
        found, highest = receive(torch.cat((index.double(), logits.gather(-1, index).double()), -1).T)
    # NaN counts as the highest in both.
    return [
        int(token) if abs(most) < float("inf") else None for token, most in zip(found, highest, strict=True)
    ]


def _batch(
    states: Sequence[SamplerState], answers: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
) -> SamplingBatch:
    each = list(zip(states, answers, drafts, strict=True))
    settings = torch.tensor([state.settings(*place) for state, *place in each], dtype=torch.float64)
    return SamplingBatch(
        settings,
        *_joined([state.bias(*place) for state, *place in each]),
        *_joined([state.seen(*place) for state, *place in each]),
    )


def _joined(rows: Sequence[tuple[array[Any], ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Put the arrays of all rows one behind the other.  Returns where each begins, the tokens and the values."""
    starts = [0]
    for tokens, _ in rows:
        starts.append(starts[-1] + len(tokens))
    if not starts[-1]:
        return torch.zeros(len(starts), dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    tokens_of_all, values_of_all = (bytearray().join(row[part] for row in rows) for part in range(2))
    return (
        torch.tensor(starts),
        torch.frombuffer(tokens_of_all, dtype=torch.int64),
        torch.frombuffer(values_of_all, dtype=torch.float32),
    )


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [token for token, _ in pairs], [value for _, value in pairs]
