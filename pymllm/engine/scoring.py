"""Log-likelihoods of texts: how likely a model finds the tokens that follow a prompt, or those of a whole text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pymllm.engine.asking import Asked
from pymllm.engine.request import RequestOutput
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.session import Session
from pymllm.errors import RequestError, counted
from pymllm.text.prompts import Prompt, as_prompts
from pymllm.text.tokenizer import Tokenizer

# The likeliest token beside each that is scored tells whether greedy decoding would have given it.
PARAMS = SamplingParams(max_tokens=1, prompt_logprobs=1)

Encode = Callable[[Prompt], list[int]]


@dataclass(frozen=True)
class Score:
    """The log-probabilities of a continuation's tokens, each given all that comes before it.

    prompt_token_ids: what comes before.  token_ids: what is scored.  logprobs: natural logarithms, one a token.
    greedy: for each token, whether it is the likeliest one; of equally likely tokens the lowest is.
    cached_tokens: how many tokens were not read, as pages of the KV cache held them already.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    cached_tokens: int = 0

    @property
    def logprob(self) -> float:
        """The log-probability of the whole continuation: the sum over its tokens."""
        return math.fsum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """True if greedy decoding after the prompt would have given just these tokens."""
        return all(self.greedy)

    @property
    def num_tokens(self) -> int:
        """The number of tokens that are scored."""
        return len(self.token_ids)

    @property
    def perplexity(self) -> float:
        """The exponential of the mean of minus the log-probabilities; infinite where a token is impossible."""
        mean = -self.logprob / len(self.logprobs)
        return math.exp(mean) if mean < math.log(1e308) else math.inf


@dataclass(frozen=True)
class ScoredText:
    """Token ids of which those from `first` on are scored.  whole: whether it may be read in windows."""

    ids: tuple[int, ...]
    first: int
    whole: bool = False

    def windows(self, longest: int) -> Iterator[ScoredText]:
        """Divide a text so that each part runs at most `longest` tokens, and every token is scored once.

        The last token of a part is scored, but not run. Each part after the first has as much before what it scores as
        fits, one token at least; this is how lm-eval's rolling windows lie.
        """
        done = self.first
        while done < len(self.ids):
            # The first one begins where the text does.
            stop = min(done + longest if done > self.first else longest + 1, len(self.ids))
            start = max(stop - longest - 1, 0)
            yield ScoredText(self.ids[start:stop], done - start, True)
            done = stop


def pair_up(
    prompts: Prompt | Sequence[Prompt], continuations: Prompt | Sequence[Prompt | None] | None
) -> list[tuple[Prompt, Prompt | None]]:
    """Bring prompts and continuations together; several continuations of a single prompt each get that prompt.

    RequestError if there are neither as many of both, nor one prompt.
    """
    many = as_prompts(prompts)
    if continuations is None:
        return [(prompt, None) for prompt in many]
    given = as_prompts(continuations)  # type: ignore[arg-type]
    if len(many) == 1:
        many = many * len(given)
    if len(many) != len(given):
        raise RequestError(
            "there must be one continuation for each prompt, or one prompt for all",
            code="parameter",
            tensor="continuations",
            expected=str(len(many)),
            found=str(len(given)),
        )
    return list(zip(many, given, strict=True))


class PairEncoder:
    """The token ids of prompts and their continuations.

    encode: makes and checks ids of a text or of ids.
    """

    def __init__(self, tokenizer: Tokenizer, encode: Encode) -> None:
        self.tokenizer, self.encode = tokenizer, encode
        self._after: int | None = None
        self._last: tuple[str, list[int]] | None = None

    def __call__(self, pairs: Iterable[tuple[Prompt, Prompt | None]]) -> list[ScoredText]:
        """Encode pairs, and whole texts.

        Two texts are encoded as one, and the tokens after as many as the prompt has alone are scored; white space at
        the end of the prompt counts as the continuation's, since tokens begin with it. This is lm-eval's rule.
        What is given as ids stays as it is. An empty prompt is the token that texts begin with, or else the end token.
        RequestError where no token is left to score.
        """
        texts = []
        for place, (prompt, continuation) in enumerate(pairs):
            text = self._whole_text(prompt) if continuation is None else self._pair(prompt, continuation)
            if text.first >= len(text.ids):
                what = "a text needs a token after another" if text.whole else "a continuation has no tokens"
                where = "prompts" if continuation is None else "continuations"
                raise RequestError(
                    what,
                    code="nothing-to-score",
                    tensor=f"{where}[{place}]",
                    expected="at least one token to score",
                )
            texts.append(text)
        return texts

    def _whole_text(self, text: Prompt) -> ScoredText:
        return ScoredText(tuple(self.encode(text)), 1, True)

    def _pair(self, prompt: Prompt, continuation: Prompt) -> ScoredText:
        if not (isinstance(prompt, str) and isinstance(continuation, str)):
            before = self._begin(prompt) if isinstance(prompt, str) else self.encode(prompt)
            scored = (
                self.tokenizer.encode(continuation, add_special_tokens=False)
                if isinstance(continuation, str)
                else self.encode(continuation)
            )
            return self._joined(before, [*before, *scored])
        before, ids = self._begin(prompt.rstrip()), self._between(prompt + continuation)
        if not continuation:
            return ScoredText(tuple(ids), len(ids))
        if len(before) >= len(ids):
            # The last tokens of the prompt and the continuation are one.
            pairs = enumerate(zip(before, ids, strict=False))
            before = before[: next((at for at, (a, b) in pairs if a != b), len(ids) - 1)]
        return self._joined(before, ids)

    def _joined(self, before: Sequence[int], ids: Sequence[int]) -> ScoredText:
        if before:
            return ScoredText(tuple(ids), len(before))
        lead = self._lead()
        return ScoredText((*lead, *ids), len(lead), True)

    def _begin(self, prompt: str) -> list[int]:
        """Encode a prompt, once where several pairs in a row have it."""
        if self._last is None or self._last[0] != prompt:
            self._last = (prompt, self._between(prompt))
        return self._last[1]

    def _between(self, text: str) -> list[int]:
        """Encode a text, without what the tokenizer puts after its end."""
        if self._after is None:
            alone, around = (
                self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True)
            )
            starts = range(len(around) - len(alone) + 1)
            start = next((at for at in starts if around[at : at + len(alone)] == alone), len(around))
            self._after = max(len(around) - start - len(alone), 0)
        ids = self.encode(text)
        return ids[: len(ids) - self._after]

    def _lead(self) -> list[int]:
        """Find the token that comes before a text with nothing before it: the first one, or else the end token."""
        for name in ("bos_token", "eos_token"):
            token = self.tokenizer.settings.get(name)
            content = token.get("content") if isinstance(token, Mapping) else token
            ids = self.tokenizer.encode(content, add_special_tokens=False) if isinstance(content, str) else []
            if len(ids) == 1:
                return ids
        raise RequestError(
            "a prompt is empty, and the tokenizer names no token that texts begin with",
            code="prompt-empty",
            tensor="prompts",
            fix="Pass the ids of a token as the prompt.",
        )


class Scoring:
    """The requests that score some texts, and what their outputs make of them.

    asked: one for each text, or for each window of a long one, in an order in which equal beginnings are side by side,
    so that what is shared is read once; `place` is the text's.
    """

    def __init__(self, texts: Iterable[ScoredText], adapter: str | None, longest: int) -> None:
        self.texts = list(texts)
        asked = []
        for place, text in enumerate(self.texts):
            if not text.whole:
                _check_length(text, place, longest)
            for index, part in enumerate(text.windows(longest)):
                asked.append(Asked(list(part.ids), PARAMS, adapter, place, index, part.first))
        self.asked = sorted(asked, key=lambda one: one.ids)

    def run(self, session: Session) -> list[Score]:
        """Score the texts.  Raises what a request's step raises."""
        # Not all at once, of which there may be a million.
        room = 2 * session.engine.scheduler.max_requests
        todo = iter(enumerate(self.asked))
        outputs: dict[int, RequestOutput] = {}
        while len(outputs) < len(self.asked):
            while len(session.unfinished) < room and (following := next(todo, None)) is not None:
                number, one = following
                session.add(one.ids, one.params, one.adapter, number, first_scored=one.first_scored)
            for request, piece in session.step():
                if request.error is not None:
                    raise request.error
                if piece is not None and piece.output is not None:
                    outputs[request.req_id] = piece.output
        return self.scores([outputs[number] for number in range(len(self.asked))])

    def scores(self, outputs: Sequence[RequestOutput]) -> list[Score]:
        """Make the scores of the outputs of `asked`."""
        parts = sorted(zip(self.asked, outputs, strict=True), key=lambda part: (part[0].place, part[0].index))
        return [
            self._score(self.texts[place], [output for _, output in group])
            for place, group in groupby(parts, key=lambda part: part[0].place)
        ]

    @staticmethod
    def _score(text: ScoredText, outputs: Sequence[RequestOutput]) -> Score:
        entries = [entry for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
        scored = text.ids[text.first :]
        assert tuple(entry.token_id for entry in entries) == scored
        return Score(
            text.ids[: text.first],
            scored,
            tuple(entry.logprob for entry in entries),
            tuple(entry.top[0][0] == entry.token_id for entry in entries),
            sum(output.cached_tokens for output in outputs),
        )


def _check_length(text: ScoredText, place: int, longest: int) -> None:
    if len(text.ids) > longest + 1:
        raise RequestError(
            "a prompt and its continuation are too long together",
            code="prompt-too-long",
            tensor=f"prompts[{place}]",
            expected=f"at most {counted(longest + 1, 'token')}",
            found=str(len(text.ids)),
            fix="Shorten the prompt from its beginning, or score the whole text, which is read in windows.",
        )
