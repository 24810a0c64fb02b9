"""The engine: it runs the scheduler's steps, samples, and finishes requests one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from threading import RLock
from typing import Any, Generic, TypeVar

import torch

from pymllm.adapters.loading import loaded_adapters, why_adapter_is_gone
from pymllm.engine.asking import check_length
from pymllm.engine.choosing import TokenLogprobs, cut, describe
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.pace import STEP_MS, Pace
from pymllm.engine.prefixes import State, current_state
from pymllm.engine.request import Request
from pymllm.engine.runner import Runner
from pymllm.engine.sampling import SamplingParams
from pymllm.engine.scheduler import MAX_REQUESTS, Scheduler
from pymllm.engine.states import StatePool
from pymllm.engine.strategies import Autoregressive, DecodingStrategy, make_strategy
from pymllm.errors import RequestError, counted
from pymllm.kernels.hardware import probe_device
from pymllm.kernels.registry import select
from pymllm.kernels.sampling import SamplingKernel, SamplingProblem
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import Parallel
from pymllm.weights.memory import available_memory

Made = TypeVar("Made")

LOGIT_BYTES = 4  # of one logit of a whole text, at least


class made_once(Generic[Made]):
    """A property of an engine that is made when it is first asked for.

    Up to Python 3.11 `functools.cached_property` holds one lock for all engines of a process. Ranks that threads
    simulate wait for one another while each makes its own, which then is for ever: here each engine has its lock.
    """

    def __init__(self, make: Callable[[Engine], Made]) -> None:
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, engine: Engine | None, owner: type | None = None) -> Made:
        if engine is None:
            return self  # type: ignore[return-value]
        with engine.making:
            if self.name not in vars(engine):
                vars(engine)[self.name] = self.make(engine)
        made: Made = vars(engine)[self.name]
        return made


class Engine:
    """Continuous batching over a paged KV cache: requests come and go between steps, by `Scheduler`'s rules.

    cache_pages: of the KV cache.  state_slots, remembered_states: how many requests have room for a state where layers
    keep one, and how many states are remembered.  prefix_reuse: whether requests share pages.  step_ms: see `Pace`.
    strategy: how answers are decoded.  clock: tells the time, in seconds.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        parallel: Parallel,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int,
        cache_pages: int,
        end_tokens: frozenset[int],
        sampling_kernel: str | None = None,
        prefix_reuse: bool = True,
        state_slots: int = MAX_REQUESTS,
        remembered_states: int = 0,
        step_ms: float = STEP_MS,
        strategy: DecodingStrategy | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.parallel = model, parallel
        self.device, self.dtype = device, dtype
        self.max_length, self.cache_pages = max_length, cache_pages
        self.state_slots, self.remembered_states = state_slots, remembered_states
        self.end_tokens, self.prefix_reuse = end_tokens, prefix_reuse
        self.pace, self.clock = Pace(step_ms), clock
        self.making = RLock()
        # What steps models, its own first, and the cache of each.
        self.runners: list[tuple[Runner, PagedKVCache]] = []
        self.strategy = strategy or make_strategy(model.strategy)
        # What lies beyond a request's end is run with its last block.
        block = self.strategy.block_length
        longest = -(-max_length // block) * block
        self.runner = Runner(model, device, longest, self.strategy, parallel.leader)
        self.runner.score_prompts = self._score_prompts
        problem = SamplingProblem(probe_device(str(device)))
        self.sampling_kernel: SamplingKernel = select("sampling", problem, sampling_kernel).kernel

    @made_once
    def cache(self) -> PagedKVCache:
        """Make the KV cache; only on first use, so that logits alone need none."""
        # What a request may have is rank 0's to say, as ranks that differ would run other steps.
        pages, self.max_length, self.prefix_reuse = self.parallel.broadcast(
            (self.cache_pages, self.max_length, self.prefix_reuse)
        )
        self._tell({"do": "cache", "pages": pages})
        return PagedKVCache(self.model, pages, self.device)

    @made_once
    def states(self) -> StatePool | None:
        """Make room for the states of requests; None where no layer keeps one."""
        most = self.remembered_states if self.prefix_reuse else 0
        slots, most = self.parallel.broadcast((self.state_slots, most))
        self._tell({"do": "states", "slots": slots, "remembered": most})
        return StatePool.of(self.model, slots, self.device, most, self.parallel.leader)

    @made_once
    def scheduler(self) -> Scheduler:
        self.runner.states = self.states
        self._tell({"do": "open"})
        self.open_strategy()
        return Scheduler(
            self.cache,
            whole=self.model.keys_depend_on_length,
            reuse=self.prefix_reuse,
            piece=lambda: self.parallel.broadcast(self.pace.piece()),
            state=self._state,
            states=self.states,
            strategy=self.strategy,
        )

    def _state(self) -> State:
        """Return the state of the model that a request begins with."""
        self.runner.notice()
        state: State = tuple(self.parallel.broadcast(current_state()))
        return state

    def _tell(self, message: Mapping[str, Any]) -> None:
        """Have the ranks that follow this one, if any, make what it makes."""
        if self.parallel.leader is not None:
            self.parallel.leader.send(message)

    def open_strategy(self) -> None:
        """Make what the decoding strategy needs beside the model and the cache."""
        self.runners = [(self.runner, self.cache)]
        self.strategy.open(self.model, self.cache, self.parallel, self._run_beside)

    def _run_beside(self, model: LanguageModel) -> Callable[[list[Request]], torch.Tensor]:
        """Make what runs another model on this device, with as many pages as the engine's own cache."""
        cache = PagedKVCache(model, self.cache.num_pages, self.device)
        number, leader = len(self.runners), self.parallel.leader
        runner = Runner(model, self.device, self.max_length, Autoregressive(), leader, number)
        self.runners.append((runner, cache))
        return lambda requests: runner.step(requests, cache)

    @property
    def idle(self) -> bool:
        """True if no request runs or waits."""
        return not self.scheduler.running and not self.scheduler.waiting

    def add(self, request: Request) -> None:
        """Queue a request.  RequestError if it can never run: it is too long for the model, or for the whole cache."""
        request.limit = min(
            request.limit, self.check(request.prompt, request.params, answers=not request.reads_only)
        )
        request.restart_length = self.model.restart_length
        ends = {*request.params.stop_token_ids, *(() if request.params.ignore_eos else self.end_tokens)}
        vocabulary, sampler = self.model.config.size("vocab_size"), request.sampler
        sampler.ends = tuple(token for token in ends if token < vocabulary)
        sampler.bad_words = tuple(word for word in sampler.bad_words if max(word) < vocabulary)
        if request.adapter is not None:
            request.held_adapter = loaded_adapters(self.model).get(request.adapter)
        self.strategy.begin(request)
        self.scheduler.waiting.append(request)

    @property
    def longest(self) -> int:
        """The number of tokens that the model, and the whole cache, have room for."""
        room = min(self.model.max_length, self.cache.num_pages * self.cache.page_size)
        return min(self.max_length, self.strategy.usable_length(room))

    def check_text(self, tokens: int) -> None:
        """Raise RequestError where a text is too long for the model, or its logits for the memory."""
        longest, vocabulary = self.model.max_length, self.model.config.size("vocab_size")
        # Dynamic scaling of positions is there for texts beyond them.
        if tokens > longest and not self.model.scales_with_length:
            raise RequestError(
                f"the text is too long: this model's maximum context length is {counted(longest, 'token')}",
                code="prompt-too-long",
                tensor="token_ids",
                expected=f"up to {counted(longest, 'token')}",
                found=str(tokens),
                fix="Take the text in pieces.",
            )
        needed, available = tokens * vocabulary * LOGIT_BYTES, available_memory(str(self.device))
        if available is not None and needed > available:
            raise RequestError(
                f"the logits of the text take {needed / 1e9:.2f} GB, but only {available / 1e9:.2f} GB are free",
                code="out-of-memory",
                tensor="token_ids",
                expected=f"up to {counted(available // (vocabulary * LOGIT_BYTES), 'token')}",
                found=str(tokens),
                fix="Take the text in pieces.",
            )

    def check(self, prompt: Sequence[int], params: SamplingParams, answers: bool = True) -> int:
        """Return how many tokens a request may have in all.  RequestError if this model can never run it.

        answers: whether it needs room for a token after its prompt.
        """
        if not prompt:
            raise RequestError("the prompt has no tokens", code="prompt-empty", tensor="prompt")
        if not answers and "prompt_logprobs" in self.strategy.refuses:
            raise RequestError(
                "this model answers by blocks: a token has no probability given those before it alone",
                code="score-blocks",
                tensor="prompt",
                fix="Score with a model that answers a token at a time.",
            )
        self.strategy.check(params)
        longest = self.longest
        check_length(len(prompt), longest, answers)
        vocabulary = self.model.config.size("vocab_size")
        if max(prompt) >= vocabulary:
            # A tokenizer may have more tokens than the model, and a text any of them.
            raise RequestError(
                "the prompt has a token outside the vocabulary",
                code="token-id",
                tensor="prompt",
                expected=f"0 to {vocabulary - 1}",
                found=str(max(prompt)),
            )
        biased = [token for token, _ in params.logit_bias]
        for name, tokens in (("logit_bias", biased), ("stop_token_ids", params.stop_token_ids)):
            bad = next((token for token in tokens if token >= vocabulary), None)
            if bad is not None:
                raise RequestError(
                    f"{name} names a token outside the vocabulary",
                    code="token-id",
                    tensor=name,
                    expected=f"0 to {vocabulary - 1}",
                    found=str(bad),
                )
        return longest

    def step(self) -> list[Request]:
        """Run the model once and sample.  Returns the requests that took part.

        A request that read only a part of its prompt has no new token. A request whose own step failed has its `error`
        set, and has left the engine, as has one whose adapter is no longer what it was when the request was queued.
        """
        failed = self._fail_without_adapter((*self.scheduler.running, *self.scheduler.waiting))
        for request in failed:
            request.running_sequence = []
            self.scheduler.remove(request)
        batch = self.scheduler.schedule()
        if not batch:
            return failed
        started = self.clock()
        pieces = [len(request.running_sequence) for request in batch if request.is_reading]
        ran, logits = self._run(batch)
        for request in ran:
            if request.reads_only:
                request.end_reading()
            else:
                self.strategy.end_run(request)
            request.count_step()
            self.scheduler.keep(request)
        ready = [request for request in ran if request.rows]
        chosen = self._choose(ready, logits)
        if self.device.type == "cuda" and not ready:
            # Nothing has waited for the step yet.
            torch.cuda.synchronize(self.device)
        # A step that failed ran several times.
        if len(ran) == len(batch):
            self.pace.note(self.clock() - started, sum(pieces), len(batch) - len(pieces))
        # Another thread may have changed it while the step ran, in some layers.
        self._fail_without_adapter(batch)
        for request, choice in zip(ready, chosen, strict=True):
            if request.error is None:
                self.strategy.accept(request, choice, self.end_tokens)
        for request in batch:
            if request.finish_reason is not None:
                self.scheduler.remove(request)
        return [*failed, *batch]

    def _fail_without_adapter(self, requests: Sequence[Request]) -> list[Request]:
        """Fail those whose adapter is gone: their tokens would come from other weights than the ones before."""
        failed = []
        for request in requests:
            held = request.held_adapter
            why = None if held is None else why_adapter_is_gone(self.model, held)
            if why is not None and request.error is None:
                request.fail(
                    RequestError(
                        f"the adapter {request.adapter!r} {why} before the answer was complete",
                        code="adapter-gone",
                        tensor="adapter",
                        fix="Ask again.",
                    )
                )
                failed.append(request)
        return failed

    def abort(self, request: Request) -> None:
        """End a request wherever it is; its pages and its state are free at once."""
        request.finish_reason = request.finish_reason or "abort"
        self.scheduler.remove(request)

    def _run(self, batch: list[Request]) -> tuple[list[Request], torch.Tensor | None]:
        """Run a step.  Returns the requests that could be run, and the logits that they asked for, [N, V], if any.

        If a step of several requests fails, each is run alone, so that only the one to blame fails again.
        """
        try:
            return batch, self.runner.step(batch, self.cache)
        except Exception as error:
            if self.parallel.size > 1:
                # Other ranks may not have failed.
                raise
            if len(batch) == 1:
                batch[0].fail(error)
        ran, rows = [], []
        for request in batch if len(batch) > 1 else ():
            try:
                rows.append(self._run_alone(request).clone())
                ran.append(request)
            except Exception as error:
                request.fail(error)
        try:
            return ran, torch.cat([row.to(rows[-1]) for row in rows]) if rows else None
        except Exception as error:
            for request in ran:
                request.fail(error)
            return [], None

    def _run_alone(self, request: Request) -> torch.Tensor:
        """Run a request's tokens once more, after a step that it shared has failed.  Returns its logits.

        The same keys and values are written again, which is harmless. A state though may have taken the tokens in
        already, in some layers: it is made anew from the request's first token.
        """
        if self.states is None:
            return self.runner.step([request], self.cache)
        before = request.computed, request.running_sequence, request.is_prefilling, request.rows
        stop = request.computed + len(request.running_sequence)
        most = stop if self.scheduler.whole else self.scheduler.step_tokens
        request.computed = 0
        while True:
            count = request.start_step(min(most, stop - request.computed))
            is_last = request.computed + count == stop
            request.rows = [count - 1] if is_last and before[-1] else []
            logits = self.runner.step([request], self.cache)
            if is_last:
                break
            request.computed += count
        request.computed, request.running_sequence, request.is_prefilling, request.rows = before
        return logits

    def _choose(self, requests: list[Request], logits: torch.Tensor | None) -> list[Any]:
        """Choose by the logits of each request, as its strategy does, the same on all ranks.

        If that fails for several together, each is tried alone, so that only the one to blame fails.
        """
        if not requests or logits is None:
            return []
        try:
            chosen = self.strategy.choose(requests, logits, self.sampling_kernel)
        except Exception as error:
            if self.parallel.size > 1 and not self.parallel.led:
                # Other ranks may not have failed.
                raise
            if len(requests) == 1:
                requests[0].fail(error)
                return [None]
            rows = zip(requests, logits.split([len(request.rows) for request in requests]), strict=True)
            return [entry for request, row in rows for entry in self._choose([request], row)]
        if self.parallel.size == 1 or self.parallel.led:
            return chosen
        return _read_choices(self.parallel.broadcast(_write_choices(chosen)))

    def _score_prompts(self, owners: Sequence[Request], logits: torch.Tensor) -> None:
        """Note the log-probabilities of the next tokens of prompts.

        owners: the request of each row; its rows are side by side.  logits: [R, V], after one token each.
        """
        parts = [(request, len(list(rows))) for request, rows in groupby(owners)]
        try:
            self._note_scores(parts, logits)
        except Exception:
            if not self.parallel.led:
                raise
            # The forward goes on here as on the other ranks; whoever is to blame fails.
            for part, rows in zip(parts, logits.split([count for _, count in parts]), strict=True):
                try:
                    self._note_scores([part], rows)
                except Exception as error:
                    part[0].fail(error)

    def _note_scores(self, parts: Sequence[tuple[Request, int]], logits: torch.Tensor) -> None:
        owners = [request for request, count in parts for _ in range(count)]
        tokens = [token for request, count in parts for token in request.unscored_tokens(count)]
        counts = [request.params.prompt_logprobs or 0 for request in owners]
        entries = describe(logits, tokens, max(counts), self.sampling_kernel)
        for request, entry, count in zip(owners, entries, counts, strict=True):
            request.prompt_logprobs.append(cut(entry, count))


def _write_choices(chosen: Any) -> Any:
    """Write what a strategy has chosen as JSON has it."""
    if isinstance(chosen, TokenLogprobs):
        return {"token_id": chosen.token_id, "logprob": chosen.logprob, "top": chosen.top}
    return [_write_choices(each) for each in chosen] if isinstance(chosen, (list, tuple)) else chosen


def _read_choices(written: Any) -> Any:
    """Read what `_write_choices` has written; tuples have become lists."""
    if isinstance(written, dict):
        top = tuple((token, logprob) for token, logprob in written["top"])
        return TokenLogprobs(written["token_id"], written["logprob"], top)
    return [_read_choices(each) for each in written] if isinstance(written, list) else written
