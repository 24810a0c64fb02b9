"""The settings of one request's sampling; `choosing.py` applies them."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pymllm.arguments import checked
from pymllm.errors import ConfigError, RequestError, choices, counted, nearest
from pymllm.text.grammars import Grammar, Kind

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 128
MAX_STOP_TOKENS = 1024
MAX_ANSWERS = 128

# Which open positions of a block take their tokens: those of a probability above a threshold, the likeliest few, or the
# leftmost few.
REMASKING = ("low_confidence_dynamic", "low_confidence_static", "sequential")

# The settings of decoding by blocks (docs/block-diffusion.md); other strategies have no use for them.
BLOCK_SETTINGS = (
    *("denoising_steps", "confidence_threshold", "remasking", "edit_threshold", "max_post_edit_steps"),
    *("max_nfe", "max_repetition_run"),
)

# The settings that name a grammar, and its kind.
GRAMMARS: dict[str, Kind] = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark"}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's settings; a value out of range is a RequestError that names the parameter.

    max_tokens: how many new tokens at most; None: up to the model's length.  min_tokens: how many at least: until then
    nothing ends the answer, and tokens that would are not chosen.  n: how many answers, which share nothing but the
    prompt.  temperature: 0 is greedy.
    top_k: how many of the likeliest tokens remain; 0 or -1: all.  top_p: the likeliest tokens of this probability
    together remain.  min_p: tokens at least this many times as likely as the likeliest remain.  typical_p: tokens of
    this probability together remain whose information is nearest to its expectation (locally typical sampling).
    repetition_penalty: above 1 makes tokens less likely that the text already has.  frequency_penalty,
    presence_penalty: subtracted from a token's logit for each earlier occurrence in the answer, or once for any.
    The order in which these work: `pymllm/kernels/sampling.py`.
    stop: strings that end the answer and are left out of it.  stop_token_ids: tokens that end it.
    ignore_eos: whether the model's own end tokens do not end it.
    skip_special_tokens: whether special tokens, such as those around messages, are left out of the answer's text.
    kept_tokens: special tokens that are a part of it in any case.
    include_stop_str_in_output: whether the text has the stop string that ended it, and the token, if that is text.
    bad_words: strings whose tokens, at the start of a text or after a space, never come to an end in the text.
    seed: makes equal answers to equal requests, whatever runs beside them; answer i of n is that of seed + i.
    logprobs: for how many of the likeliest tokens to report log-probabilities; None: for none, not even the chosen one.
    prompt_logprobs: the same for the tokens of the prompt.
    logit_bias: (token id, what is added to its logit) pairs, or a dict of them.
    json_schema: a JSON schema (an object, its text, or true for any JSON) that the answer follows.  regex: a regular
    expression that it matches as a whole.  grammar: one in Lark's notation.  At most one of the three.
    follows: that one, read.

    Of models that are decoded by blocks alone, None being what is usual in the model's family:
    denoising_steps: in how many forwards a block is filled at most.  confidence_threshold: an open position takes its
    token if that is likelier.  remasking: one of REMASKING.  edit_threshold: a token that stands already is replaced by
    one likelier than this.  max_post_edit_steps: for how many forwards that goes on in a block that is filled.
    max_nfe: after so many decoding steps the answer ends.  max_repetition_run: it ends once it ends in so many equal
    tokens.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    kept_tokens: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = field(default=())
    json_schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    denoising_steps: int | None = None
    confidence_threshold: float | None = None
    remasking: str | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    max_nfe: int | None = None
    max_repetition_run: int | None = None
    follows: Grammar | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        for name in ("stop_token_ids", "kept_tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if isinstance(self.logit_bias, dict):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        _integer("max_tokens", self.max_tokens, 1, 2**31, optional=True)
        _integer("min_tokens", self.min_tokens, 0, 2**31 if self.max_tokens is None else self.max_tokens)
        _integer("n", self.n, 1, MAX_ANSWERS)
        _number("temperature", self.temperature, 0, 100)
        _number("top_p", self.top_p, 0, 1, above=True)
        _integer("top_k", self.top_k, -1, 2**31)
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        _number("min_p", self.min_p, 0, 1)
        _number("typical_p", self.typical_p, 0, 1, above=True)
        # Logits that were divided by less would be no numbers.
        _number("repetition_penalty", self.repetition_penalty, 1e-6, 100)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _integer("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        _strings("stop", self.stop, MAX_STOP_STRINGS)
        _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31)
        _at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIASES)
        for token, bias in self.logit_bias:
            _integer("logit_bias", token, 0, 2**31)
            _number("logit_bias", bias, -100, 100)
        _integer("denoising_steps", self.denoising_steps, 1, 2**31, optional=True)
        _integer("max_post_edit_steps", self.max_post_edit_steps, 0, 2**31, optional=True)
        _integer("max_nfe", self.max_nfe, 1, 2**31, optional=True)
        _integer("max_repetition_run", self.max_repetition_run, 1, 2**31, optional=True)
        if self.confidence_threshold is not None:
            _number("confidence_threshold", self.confidence_threshold, 0, 1, above=True)
        if self.edit_threshold is not None:
            _number("edit_threshold", self.edit_threshold, 0, 1)
        if self.remasking is not None and self.remasking not in REMASKING:
            raise RequestError(
                "remasking is out of range",
                code="parameter",
                tensor="remasking",
                expected=choices(REMASKING),
                found=repr(self.remasking),
                fix=nearest(str(self.remasking), REMASKING),
            )

        if sum(getattr(self, name) is not None for name in GRAMMARS) > 1:
            raise RequestError(
                "an answer follows one grammar at most",
                code="parameter",
                tensor="grammar",
                expected=f"one of {', '.join(GRAMMARS)}",
            )
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", Grammar.of_schema(self.json_schema).text)
        object.__setattr__(self, "follows", self._find_grammar())

    def _find_grammar(self) -> Grammar | None:
        """Find the grammar that the answer follows; None: there is none."""
        found = ((kind, getattr(self, name)) for name, kind in GRAMMARS.items())
        return next((Grammar(kind, text) for kind, text in found if text is not None), None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """True if what the text has changes the logits."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)

    @property
    def takes_likeliest(self) -> bool:
        """True if the next token is simply that of the highest logit, and nothing else is asked for."""
        if self.follows is not None:
            return False
        changed = self.penalises or self.logit_bias or self.bad_words or self.min_tokens
        return self.greedy and self.logprobs is None and not changed

    def of_answer(self, index: int) -> SamplingParams:
        """Return the settings of one of the `n` answers: its own seed, and the prompt is reported with the first."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index) % 2**64
        return replace(self, n=1, seed=seed, prompt_logprobs=None if index else self.prompt_logprobs)


SamplingParams.__init__ = checked(kinds=False)(SamplingParams.__init__)  # type: ignore[method-assign]

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def recommended_settings(settings: Mapping[str, Any], refuses: Container[str], file: str) -> dict[str, Any]:
    """Return the fields of `SamplingParams` that a checkpoint's generation_config.json recommends.

    refuses: the fields that its strategy has not.  file: where the settings stand.  ConfigError for values that no
    field can have.
    """
    if not settings.get("do_sample"):
        return {}
    found = {
        name: settings[name] for name in RECOMMENDED if settings.get(name) is not None and name not in refuses
    }
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(
            f"the checkpoint recommends sampling that cannot be: {error.message}",
            code="config-value",
            file=file,
            tensor=error.tensor,
            expected=error.expected,
            found=error.found,
            fix="Correct the file, or set do_sample to false in it.",
        ) from None
    return found


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


def _at_most(name: str, values: tuple[Any, ...], count: int) -> None:
    if len(values) > count:
        raise RequestError(
            f"{name} is out of range",
            code="parameter",
            tensor=name,
            expected=f"at most {counted(count, 'token')}",
            found=str(len(values)),
        )


def _strings(name: str, values: tuple[Any, ...], count: int) -> None:
    fine = all(isinstance(value, str) and 0 < len(value) <= MAX_STOP_LENGTH for value in values)
    if len(values) > count or not fine:
        raise RequestError(
            f"{name} is out of range",
            code="parameter",
            tensor=name,
            expected=f"at most {count} strings of 1 to {MAX_STOP_LENGTH} characters",
            found=f"{len(values)} strings",
        )
