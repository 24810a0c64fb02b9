"""One request: its tokens, how far it has come, and its answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pymllm.adapters.loading import LoadedAdapter
from pymllm.engine.choosing import SamplerState, TokenLogprobs
from pymllm.engine.metrics import RequestMetrics, measure
from pymllm.engine.prefixes import PageKeys
from pymllm.engine.sampling import SamplingParams
from pymllm.weights.memory import is_out_of_memory, out_of_memory

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    text: "" without a tokenizer.  finish_reason: "stop" (an end token or a stop string), "length" or "abort".
    prefill_seconds: from admission to the first token.  decode_seconds: from the first token to the last.
    logprobs: one of each token, if they were asked for.  prompt_logprobs: one of each token of the prompt; None for the
    first, which nothing comes before.
    cached_tokens: how many of the prompt's tokens were not read, as pages of the KV cache held them already.
    metrics: its times and counts.
    others: the other answers to the prompt, if several were asked for.
    stopped_by: the stop string that ended it; None: none did.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prefill_seconds: float
    decode_seconds: float
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    others: tuple[RequestOutput, ...] = ()
    stopped_by: str | None = None

    @property
    def outputs(self) -> tuple[RequestOutput, ...]:
        """All answers to the prompt."""
        return (self, *self.others)

    @property
    def prefill_tokens_per_second(self) -> float:
        """The speed of the prompt's tokens that were read."""
        read = len(self.prompt_token_ids) - self.cached_tokens
        return read / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The speed of the tokens after the first."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(eq=False)
class Request:
    """A request in the engine.

    limit: how many tokens it may have in all, prompt included.  adapter: the LoRA adapter it wants; None: the active
    one.  req_id: which of the caller's prompts it is.  held_adapter: what had the adapter's name when it was queued.
    decoding: what its decoding strategy keeps of it.
    running_sequence: the tokens that its latest step ran, from position `computed` on.  rows: after which of them
    logits are wanted.  is_reading, is_prefilling: whether the step read text, and text of the prompt.  new_tokens: how
    many tokens it gave.  new_accepted: how many of these, from the first on, had been drafted.
    computed: how many of its first tokens have keys and values in `pages`.  preemptions: how often it lost its pages.
    state_slot: where its state lies in layers that keep one; None: there are none, or it does not run.
    state_places: after how many tokens of its prompt its state is to be remembered.  prompt_states, answer_state: the
    keys under which states of its prompt are, and the one of its answer so far.
    kept_pages: how many of its first pages can be found by `page_keys`.  cached_tokens: how many of the prompt's tokens
    others had computed before; what it lost itself and found again does not count.
    error: what its own step raised; the request is finished then.
    reads_only: whether it ends once its prompt is read, without an answer.
    first_scored: the first token of the prompt whose log-probability is wanted, where any are; what comes before it may
    be taken over from others.
    following: the token after the prompt, which is scored but not run; or none.
    arrived_at: when it came, as `time.perf_counter` tells the time; the other times likewise.
    steps, forwards: how many steps it took part in, and how many of these decoded, that is read nothing.
    decoded: how many tokens the latter gave.  drafted, accepted: how many tokens a strategy proposed and kept.
    restart_length: `CausalLM.restart_length`.
    private: whether its pages are no use to others.
    block_size, blocks, max_nfe_reached, max_repetition_run_reached: what `GenerationOutputs` reads of strategies that
    decode blocks; where one token comes at a time there are no blocks, nor such limits.
    """

    prompt: list[int]
    params: SamplingParams
    limit: int
    adapter: str | None = None
    req_id: int = 0
    held_adapter: LoadedAdapter | None = None
    answer: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    state_slot: int | None = None
    state_places: tuple[int, ...] = ()
    prompt_states: list[bytes] = field(default_factory=list)
    answer_state: bytes | None = None
    page_keys: PageKeys = field(default_factory=PageKeys)
    kept_pages: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    error: Exception | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    reads_only: bool = False
    first_scored: int = 1
    following: tuple[int, ...] = ()
    arrived_at: float = field(default_factory=time.perf_counter)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    decoding: Any = None
    is_prefilling: bool = True
    is_reading: bool = True
    running_sequence: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    new_tokens: int = 0
    new_accepted: int = 0
    steps: int = 0
    forwards: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0
    eos_token_generated: bool = False
    restart_length: int | None = None
    private: bool = False
    block_size: int = 1
    blocks: Sequence[Any] = ()
    max_nfe_reached: bool = False
    max_repetition_run_reached: bool = False

    def __post_init__(self) -> None:
        self.sampler = SamplerState(self.params, self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)

    def keys(self, page_size: int) -> list[bytes]:
        """Return the keys of all pages that its tokens fill, whether these have been computed or not."""
        if self.page_keys.lack(self.length, page_size):
            self.page_keys.extend(self.prompt + self.answer, page_size)
        return self.page_keys.made

    @property
    def last_token(self) -> int:
        return self.answer[-1] if self.answer else self.prompt[-1]

    @property
    def missing(self) -> int:
        """The number of its tokens that the cache lacks."""
        return self.length - self.computed

    def start_step(self, count: int) -> int:
        """Set the next `count` tokens that the cache lacks as those of the step to come.  Returns `count`."""
        start, read = self.computed, len(self.prompt)
        self.is_prefilling, self.new_tokens, self.new_accepted = start < read, 0, 0
        if start >= read:
            self.running_sequence = self.answer[start - read : start - read + count]
        elif start + count <= read:
            self.running_sequence = self.prompt[start : start + count]
        else:
            self.running_sequence = (self.prompt + self.answer)[start : start + count]
        return count

    def start_reading(self, most: int) -> int:
        """Set the next tokens, at most so many, of a prompt that is only read as those of the step to come.

        Returns how many they are.
        """
        self.rows, self.is_reading = [], True
        return self.start_step(min(self.missing, max(most, 1)))

    @property
    def next_unscored(self) -> int:
        """The first position after which a prompt token's log-probability is wanted, and not yet known."""
        return self.first_scored + len(self.prompt_logprobs) - 2

    @property
    def unscored(self) -> range:
        """The positions of this step after which a prompt token's log-probability is wanted, and not yet known."""
        if self.params.prompt_logprobs is None:
            return range(0)
        most = len(self.prompt) + len(self.following) - 1
        last = min(self.computed + len(self.running_sequence), most)
        return range(max(self.computed, self.next_unscored), last)

    def unscored_tokens(self, count: int) -> list[int]:
        """Return the next tokens whose log-probabilities are wanted."""
        first = self.next_unscored + 1
        tokens = self.prompt[first : first + count]
        return tokens if len(tokens) == count else [*tokens, *self.following]

    @property
    def reusable(self) -> int:
        """The number of its first tokens that others may have read for it, whatever its strategy wants to run."""
        if self.private:
            return 0
        if self.params.prompt_logprobs is None:
            return self.length
        return min(self.length - 1, self.next_unscored)

    def end_reading(self) -> None:
        """Note that a step of a prompt that is only read has run, and end it after the last one."""
        self.computed += len(self.running_sequence)
        if self.computed == self.length:
            self.finish_reason = "length"

    def count_step(self) -> None:
        """Count the step that has run."""
        self.steps += 1
        self.forwards += not self.is_reading

    def fail(self, error: Exception) -> None:
        """End it with an error; a lack of memory is named as one."""
        if is_out_of_memory(error):
            fix = "Ask again when fewer requests run, or for less at a time."
            lack = out_of_memory("a step of this request", error, fix=fix)
            lack.__cause__ = error
            error = lack
        self.error, self.finish_reason = error, "abort"

    # The rest of what `GenerationOutputs.record_step` reads.

    @property
    def full_response(self) -> list[int]:
        return self.answer

    @property
    def truncated_response(self) -> list[int]:
        """The answer without the token that ended it."""
        return self.answer[:-1] if self.eos_token_generated else self.answer

    @property
    def is_truncated(self) -> bool:
        return self.eos_token_generated

    @property
    def max_new_tokens_reached(self) -> bool:
        return self.finish_reason == "length" and len(self.answer) == self.params.max_tokens

    @property
    def max_model_len_reached(self) -> bool:
        ended = self.max_new_tokens_reached or self.max_nfe_reached or self.max_repetition_run_reached
        return self.finish_reason == "length" and not ended

    @property
    def completion_reason(self) -> str | None:
        return self.finish_reason

    def add_token(self, token: int, end_tokens: frozenset[int]) -> None:
        """Append a sampled token and decide whether it is the last."""
        now = time.perf_counter()
        if not self.answer:
            self.first_token_at = now
        self.last_token_at = now
        self.answer.append(token)
        self.new_tokens += 1
        self.decoded += not self.is_reading
        if self.length == self.restart_length:
            self.computed = 0
        ends = token in self.params.stop_token_ids or (token in end_tokens and not self.params.ignore_eos)
        if ends:
            self.finish_reason, self.eos_token_generated = "stop", True
        elif self.length >= self.limit:
            self.finish_reason = "length"

    def output(self, text: str = "", stopped_by: str | None = None) -> RequestOutput:
        assert self.finish_reason is not None
        metrics = measure(self)
        return RequestOutput(
            (*self.prompt, *self.following),
            tuple(self.answer),
            text,
            self.finish_reason,
            metrics.prefill_seconds,
            metrics.decode_seconds,
            tuple(self.logprobs) if self.params.logprobs is not None else None,
            tuple(self.prompt_logprobs) if self.params.prompt_logprobs is not None else None,
            self.cached_tokens,
            metrics,
            stopped_by=stopped_by,
        )
