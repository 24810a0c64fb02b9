"""The contract of decoding strategies: all that the scheduler, the engine and the runner ask, and never more.

A request's way through a step: the scheduler asks whether it reads (`is_reading`), announces those that do not together
(`look_ahead`), asks how many positions need pages (`reach`), announces those that got them (`draft`), and has each run
planned (`plan_run`); the runner runs it; `end_run` says what of it is final in the cache;
`choose` makes something of the logits that the run asked for, for all requests of the step at a time; `accept` takes
that into the request.
"""

# R requests, N rows of logits, V vocabulary

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from pymllm.engine.choosing import no_numbers, nothing_left
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.engine.sampling import SamplingParams
from pymllm.errors import RequestError
from pymllm.kernels.sampling import SamplingKernel
from pymllm.layers.step import AttnMetaDataBase
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import Parallel

# Runs the planned tokens of requests, and returns the logits [N, V] that they ask for; it is made for a model.
StepRunner = Callable[[list[Request]], Tensor]
Beside = Callable[[LanguageModel], StepRunner]

# What a request has that asks for nothing in particular.
DEFAULTS = {setting.name: setting.default for setting in fields(SamplingParams) if setting.init}


class DecodingStrategy(ABC):
    """The one strategy of an engine; what it keeps of a request is in `Request.decoding`.

    block_length: how many tokens see one another; prompts are read, and pages shared, in whole blocks.
    metadata: the class of its steps' metadata.  step_settings: keywords of that class beside those of the runner.
    refuses: the settings of `SamplingParams` that it cannot follow, or has no use for.
    """

    name: ClassVar[str]
    metadata: ClassVar[type[AttnMetaDataBase]] = AttnMetaDataBase
    refuses: ClassVar[Sequence[str]] = ()
    block_length: int = 1

    @property
    def step_settings(self) -> Mapping[str, Any]:
        return {}

    def usable_length(self, longest: int) -> int:
        """Return how many tokens of a request can be run where the model and the cache hold `longest`."""
        return longest // self.block_length * self.block_length

    def check(self, params: SamplingParams) -> None:
        """Refuse with RequestError what the strategy cannot do, or has no use for."""
        for name in self.refuses:
            value = getattr(params, name)
            if value != DEFAULTS[name]:
                raise RequestError(
                    f"{name} has no use where answers are decoded by {self.name}",
                    code="parameter",
                    tensor=name,
                    expected=repr(DEFAULTS[name]),
                    found=repr(value),
                    fix="Leave it out.",
                )

    def open(  # noqa: B027
        self, model: LanguageModel, cache: PagedKVCache, parallel: Parallel, beside: Beside
    ) -> None:
        """Make what the strategy needs beside the engine's model and its cache, before the first step.

        beside: makes what runs another model, whose keys and values lie in pages of the same numbers.
        """

    def begin(self, request: Request) -> None:  # noqa: B027
        """Make the strategy's own state of a new request."""

    def look_ahead(self, requests: Sequence[Request]) -> None:  # noqa: B027
        """Decide how far the next runs of these requests may reach; they read nothing, and may lack the pages yet."""

    def draft(self, requests: Sequence[Request]) -> None:  # noqa: B027
        """Get ready the tokens of the next runs of these requests, which have their pages now."""

    @abstractmethod
    def is_reading(self, request: Request) -> bool:
        """Tell whether text has to be read before the request's answer can go on."""

    @abstractmethod
    def reach(self, request: Request) -> int:
        """Return how many of a request's positions its next step needs pages for, all that it reads included."""

    @abstractmethod
    def shareable(self, request: Request) -> int:
        """Return how many of its first tokens a request need not run itself, if others have."""

    @abstractmethod
    def plan_run(self, request: Request, budget: int) -> int:
        """Set a request's next run: `running_sequence` from position `computed` on, `rows`, `is_reading`.

        budget: how many tokens it may have while it reads; the first block is read in any case.
        Returns how many it has.
        """

    @abstractmethod
    def end_run(self, request: Request) -> None:
        """Note that the run has been run: move `computed` to behind what is final in the cache."""

    @abstractmethod
    def choose(self, requests: Sequence[Request], logits: Tensor, kernel: SamplingKernel) -> list[Any]:
        """Make something of the logits, for all requests together; it changes nothing of them.

        logits: [N, V], the rows that each request asked for, one request behind the other.
        Returns an object for `accept` for each request; on several ranks that of the first counts on all.
        """

    @abstractmethod
    def accept(self, request: Request, chosen: Any, end_tokens: frozenset[int]) -> None:
        """Take what was chosen into a request: new tokens, its end, or its error."""

    @staticmethod
    def take(request: Request, token: int, end_tokens: frozenset[int]) -> None:
        """Append a token to an answer, and to the way through its grammar; end it where nothing more may come."""
        request.add_token(token, end_tokens)
        matcher = request.sampler.matcher
        if matcher is None or request.finish_reason is not None:
            return
        try:
            matcher.accept(token)
        except Exception as error:
            request.fail(error)
            return
        if matcher.complete:
            request.finish_reason = "stop"


# Why no token could be chosen, and the error for that.
ERRORS = {"ruled out": nothing_left, "no numbers": no_numbers}


def why_none(request: Request, row: Tensor) -> str:
    """Tell why no token can be chosen by a row of logits, [V]: a key of `ERRORS`."""
    ruled_out = request.sampler.matcher is not None and bool(row.max().isfinite())
    return "ruled out" if ruled_out else "no numbers"
