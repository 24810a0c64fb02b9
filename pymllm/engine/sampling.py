"""The choice of the next token: one request's settings, and sampling from logits."""

# R requests, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import KernelError, RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024

# How many of the likeliest tokens top_p tries before it tries all.
CANDIDATES = 1024


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's settings; a value out of range is a RequestError that names the parameter.

    max_tokens: how many new tokens at most; None: up to the model's length.  temperature: 0 is greedy.
    top_k: how many of the likeliest tokens remain; 0: all.  top_p: the likeliest tokens of this probability together
    remain.  min_p: tokens at least this many times as likely as the likeliest remain.
    repetition_penalty: above 1 makes tokens less likely that the text already has.  frequency_penalty,
    presence_penalty: subtracted from a token's logit for each earlier occurrence in the answer, or once for any.
    stop: strings that end the answer and are left out of it.  stop_token_ids: tokens that end it.
    ignore_eos: whether the model's own end tokens do not end it.  seed: makes equal answers to equal requests.
    logprobs: for how many of the likeliest tokens to report log-probabilities; None: for none, not even the chosen one.
    logit_bias: (token id, what is added to its logit) pairs, or a dict of them.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = field(default=())

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if isinstance(self.logit_bias, dict):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        _integer("max_tokens", self.max_tokens, 1, 2**31, optional=True)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, above=True)
        _integer("top_k", self.top_k, 0, 2**31)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _integer("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        if len(stop) > MAX_STOP_STRINGS or any(not s or len(s) > MAX_STOP_LENGTH for s in stop):
            raise RequestError(
                "stop is out of range",
                code="parameter",
                tensor="stop",
                expected=f"at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_LENGTH} characters",
                found=f"{len(stop)} strings",
            )
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise RequestError(
                "logit_bias is out of range",
                code="parameter",
                tensor="logit_bias",
                expected=f"at most {MAX_LOGIT_BIASES} tokens",
                found=str(len(self.logit_bias)),
            )
        for token, bias in self.logit_bias:
            _integer("logit_bias", token, 0, 2**31)
            _number("logit_bias", bias, -100, 100)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def takes_likeliest(self) -> bool:
        """True if the next token is simply that of the highest logit, and nothing else is asked for."""
        penalties = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return self.greedy and self.logprobs is None and not self.logit_bias and not penalties


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (above and value == low):
        raise RequestError(
            f"{name} is out of range",
            code="parameter",
            tensor=name,
            expected=f"a number {'above' if above else 'from'} {low} to {high}",
            found=repr(value),
        )


def _integer(name: str, value: Any, low: int, high: int, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"{name} is out of range",
            code="parameter",
            tensor=name,
            expected=f"an integer from {low} to {high}",
            found=repr(value),
        )


@dataclass
class SamplerState:
    """The state of a request's sampling that lasts from token to token."""

    params: SamplingParams
    prompt: list[int]
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.params.greedy:
            self.generator = torch.Generator()
            if self.params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.params.seed % 2**63)


def likeliest(logits: Tensor, states: Sequence[SamplerState]) -> list[int | None]:
    """Choose the next token of each request that only wants the likeliest one; None for the others.

    logits: [R, V].
    """
    plain = [state.params.takes_likeliest for state in states]
    if not any(plain):
        return [None] * len(plain)
    # On a CPU, NumPy's argmax takes a tenth of the time of torch's; both take the first of equal logits.
    highest = logits.argmax(-1) if logits.device.type != "cpu" else logits.detach().float().numpy().argmax(-1)
    tokens = highest.tolist()
    return [token if wanted else None for token, wanted in zip(tokens, plain, strict=True)]


def sample(logits: Tensor, state: SamplerState, answer: list[int]) -> tuple[int, Tensor | None]:
    """Choose the next token of one request.  Returns it, and log-probabilities [V] if they were asked for.

    logits: [V] float32.  Log-probabilities are the model's own, before temperature and cuts.
    """
    params = state.params
    logits = logits.detach().to("cpu", torch.float32)
    logprobs = logits.log_softmax(-1) if params.logprobs is not None else None
    logits = _penalise(logits, params, state.prompt, answer)
    if params.greedy:
        return int(logits.argmax()), logprobs
    logits, tokens = _cut(logits / params.temperature, params)
    chosen = _draw(logits, state.generator)
    return chosen if tokens is None else int(tokens[chosen]), logprobs


def _draw(logits: Tensor, generator: torch.Generator | None) -> int:
    """Draw an index by its probability: find the place of one random number among the running sums."""
    sums = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    if not bool(sums[-1] > 0):
        raise KernelError("the model's logits are not numbers", code="logits-nan")
    number = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    return min(int(torch.searchsorted(sums, number, right=True)), len(sums) - 1)


def _penalise(logits: Tensor, params: SamplingParams, prompt: list[int], answer: list[int]) -> Tensor:
    if params.logit_bias:
        logits = logits.clone()
        for token, bias in params.logit_bias:
            logits[token] += bias
    if params.repetition_penalty != 1.0:
        seen = torch.tensor([*{*prompt, *answer}])
        values = logits[seen]
        penalty = params.repetition_penalty
        logits = logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))
    if answer and (params.frequency_penalty or params.presence_penalty):
        counts = torch.bincount(torch.tensor(answer), minlength=logits.numel()).float()
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0).float()
    return logits


def _cut(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Cut tokens off by top_k, min_p and top_p; the likeliest token always stays.

    Returns the logits that are left, and their tokens; None: of all tokens, in order.
    """
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    if params.top_p == 1:
        return logits, None
    total = logits.logsumexp(-1)
    # To sort all 128,000 tokens of a large vocabulary takes 10 ms.
    for count in (min(CANDIDATES, logits.numel()), logits.numel()):
        best = logits.topk(count)
        mass = (best.values - total).exp().double()
        before = mass.cumsum(-1) - mass
        if before[-1] >= params.top_p:
            break
    kept = before < params.top_p
    return best.values[kept], best.indices[kept]
