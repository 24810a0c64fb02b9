"""The request of /v1/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from pymllm.engine.sampling import MAX_LOGPROBS
from pymllm.server.protocol.base import Many, refuse
from pymllm.server.protocol.neutral import COMPLETIONS, Neutral
from pymllm.server.protocol.sampled import SampledRequest, TokenId

# How many prompts one request may bring.
MAX_PROMPTS = 16

# OpenAI's default of max_tokens for completions.
COMPLETION_MAX_TOKENS = 16


class CompletionRequest(SampledRequest):
    """A text to go on from.

    suffix: what is to follow the answer, which fills in what is between; models of code have tokens for it.
    add_special_tokens: whether the tokenizer's own come before a text, <s> say.
    """

    NEUTRAL: ClassVar[Neutral] = COMPLETIONS

    prompt: str | Many[str] | Many[TokenId] | Many[Many[TokenId]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    suffix: str | None = None
    add_special_tokens: bool = True

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        # False is the chat API's way to ask for no log-probabilities.
        return {name: value for name, value in raw.items() if name != "logprobs" or value is not False}

    def check(self) -> None:
        super().check()
        if self.suffix and self.echo:
            refuse("suffix", "needs echo: false")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompts):
            refuse("suffix", "needs prompts that are text")

    def sampling(self) -> dict[str, Any]:
        """Return the keywords of SamplingParams; where the prompt is echoed, its tokens' log-probabilities come too."""
        chosen = super().sampling()
        if self.reads_only and chosen.get("min_tokens"):
            refuse("min_tokens", f"is out of range: expected 0, as max_tokens is 0, found {self.min_tokens}")
        if self.echo and self.logprobs is not None:
            if self.prompt_logprobs is not None:
                refuse("prompt_logprobs", "needs echo: false, as logprobs has those of an echoed prompt")
            chosen["prompt_logprobs"] = self.logprobs
        return chosen

    @property
    def answer_length(self) -> int:
        if self.reads_only:
            return 1
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def reads_only(self) -> bool:
        return self.echo and self.max_tokens == 0

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several, each a text or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        if not 1 <= len(self.prompt) <= MAX_PROMPTS:
            refuse("prompt", f"expected 1 to {MAX_PROMPTS} prompts, found {len(self.prompt)}")
        return self.prompt  # type: ignore[return-value]
