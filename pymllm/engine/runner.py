"""Run the model over a batch of requests: build the step's metadata, call the model, return the logits."""

# R requests, T tokens of this step, V vocabulary

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pymllm.adapters.loading import loaded_adapters
from pymllm.attention import AttnMetaDataBase, set_fetch_fn_for_attn_metadata
from pymllm.engine.decoding import RECORDED_STEP, CaptureFailed, DecodingBatch
from pymllm.engine.graphs import (
    Capture,
    bucket_of,
    capture_cuda_graph,
    scales_span_rows,
    why_not_captured,
)
from pymllm.engine.kv_cache import PagedKVCache
from pymllm.engine.request import Request
from pymllm.engine.runs import Run
from pymllm.engine.states import MAX_COPIED_BYTES, StatePool
from pymllm.engine.strategies import DecodingStrategy, make_strategy
from pymllm.engine.tape import HOOKED, NotRepeatable, why_not_recorded
from pymllm.engine.tape_memory import StepMemory
from pymllm.engine.watch import Watch
from pymllm.errors import RankError
from pymllm.kernels.copies import upload
from pymllm.kernels.hardware import on_own_device
from pymllm.layers.held import RevisedModule
from pymllm.layers.lora import AdapterBatch, use_adapters
from pymllm.models.language_model import LanguageModel
from pymllm.parallel import Leader

logger = logging.getLogger("pymllm")

# The metadata of the step that this thread runs; ranks that threads simulate each have their own.
_metadata: ContextVar[AttnMetaDataBase] = ContextVar("attention_metadata")

# Numbers of requests whose tensors and tapes are kept.
MAX_TAPES = 128

# How much they may take together, without the one region that has the intermediate tensors of all tapes.
MAX_TAPE_BYTES = 128 << 20

# How many steps run eagerly, at most, after what was recorded has become stale again and again.
MAX_PATIENCE = 4096

# Of how many tokens of a prompt logits are held at a time, where its log-probabilities are wanted.
SCORED_ROWS = 64


class Runner:
    """One model on one device.

    leader: tells the ranks that follow this one what it runs; None: there are none.  number: which of an engine's.
    """

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        max_length: int = 0,
        strategy: DecodingStrategy | None = None,
        leader: Leader | None = None,
        number: int = 0,
    ) -> None:
        self.model, self.device, self.max_length = model, device, max_length
        self.leader, self.number = leader, number
        self.strategy = strategy or make_strategy(model.strategy)
        # On a CPU decoding steps are recorded on tapes, on a GPU captured as graphs; eager_reason: why they are not.
        self.capture: Capture | None = None if device.type == "cpu" else capture_cuda_graph
        self.eager_reason: str | None = None
        # The states of requests; None where no layer keeps one.
        self.states: StatePool | None = None
        # Takes logits [R, V] after tokens of prompts, those that are wanted, in order, and whose each is.
        self.score_prompts: Callable[[Sequence[Request], Tensor], None] | None = None
        # By requests, tokens of each, threads and adapters, the last used at the end; and what must be as it was when
        # they were made.
        self._decoding: dict[tuple[int | str, ...], DecodingBatch] = {}
        self._decoding_of: tuple[Any, ...] = ()
        self._memory = StepMemory() if self.capture is None else None
        # What all of it rests on, from the first recording on.  stale: how often it has changed since a step was last
        # replayed.  patience: how many steps will run eagerly for that.
        self._watch: Watch | None = None
        self._stale = self._patience = 0
        self._exact = False  # whether graphs have no spare rows
        # Why captures have failed, as far as it was said.
        self._said: set[str] = set()

    @property
    def why_eager(self) -> str | None:
        """The first reason for decoding steps that are not replayed; None: all that were met are, or will be."""
        refused = (batch.refused for batch in self._decoding.values() if batch.refused is not None)
        return self.eager_reason or next(refused, None)

    @on_own_device
    @torch.no_grad()
    def logits(self, token_ids: list[int], adapter: str | None = None) -> Tensor:
        """Run the model over one text without a cache.  Returns float32 [T, V], on every rank.

        adapter: the LoRA adapter to use; None: the active one.
        """
        if self.leader is not None:
            self.leader.send({"do": "logits", "adapter": adapter}, token_ids)
        count = len(token_ids)
        bounds = torch.tensor([0, count], dtype=torch.int32, device=self.device)
        metadata = self.strategy.metadata(
            is_prefill=True,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            max_seqlen_q=count,
            max_seqlen_k=count,
            context_lens=bounds[1:],
            query_starts=(0, count),
            lengths=(count,),
            **self.strategy.step_settings,
        )
        with self._led():
            ids = torch.tensor(token_ids, device=self.device)
            return self._forward(ids, torch.arange(count, device=self.device), metadata, [adapter] * count)

    @on_own_device
    @torch.no_grad()
    def hidden_states(self, texts: Sequence[Sequence[int]], adapter: str | None = None) -> Tensor:
        """Run the model over several texts side by side, without a cache.

        texts: the token ids of each, at least one.  adapter: as for `logits`.
        Returns the hidden states of all tokens in order, [T, H].
        """
        counts = [len(text) for text in texts]
        if self.leader is not None:
            told = {"do": "texts", "counts": counts, "adapter": adapter}
            self.leader.send(told, [token for text in texts for token in text])
        bounds = [0, *accumulate(counts)]
        metadata = self.strategy.metadata(
            is_prefill=True,
            cu_seqlens_q=self._int32(bounds),
            cu_seqlens_k=self._int32(bounds),
            max_seqlen_q=max(counts),
            max_seqlen_k=max(counts),
            context_lens=self._int32(counts),
            query_starts=bounds,
            lengths=counts,
            **self.strategy.step_settings,
        )
        ids = torch.tensor([token for text in texts for token in text], device=self.device)
        positions = torch.tensor([place for count in counts for place in range(count)], device=self.device)
        set_fetch_fn_for_attn_metadata(_metadata.get)
        token = _metadata.set(metadata)
        try:
            with self._led(), use_adapters(AdapterBatch.of([adapter] * bounds[-1], self.device)):
                return self.model(ids, positions)
        finally:
            _metadata.reset(token)

    @on_own_device
    def step(self, requests: list[Request], cache: PagedKVCache) -> Tensor:
        """Run the tokens that the scheduler gave each request.

        Returns the logits [N, V] of the rows that each request wants; the next step overwrites them.
        """
        if all(r.rows and not self.strategy.is_reading(r) for r in requests):
            logits = self._decode(requests, cache)
            if logits is not None:
                return logits
        return self._read(requests, cache)

    def _read(self, requests: list[Request], cache: PagedKVCache) -> Tensor:
        """Run a step eagerly: one that reads prompts, or cannot be replayed."""
        run = Run.of(requests, None if self.states is None else self._slots(requests))
        if self.leader is not None:
            integers, names = run.to_integers()
            self.leader.send({"do": "step", "model": self.number, "adapters": names}, integers)
        with self._led():
            return self.run(run, cache, requests)

    @contextlib.contextmanager
    def _led(self) -> Iterator[None]:
        """Note that the ranks can do no more where this one fails: the others may not have."""
        try:
            yield
        except Exception as error:
            if self.leader is None:
                raise
            if not isinstance(error, RankError):
                error = RankError(f"rank 0 has failed: {error}", code="rank-failed")
                raise self.leader.explain(error) from error
            raise self.leader.explain(error) from None

    @on_own_device
    @torch.no_grad()
    def run(self, run: Run, cache: PagedKVCache, requests: Sequence[Request] = ()) -> Tensor:
        """Run a step that is given in numbers.

        requests: whose the logits are that are scored; without them these are computed all the same.
        Returns the logits [N, V] of the rows that are wanted.
        """
        positions = [
            p
            for start, tokens in zip(run.starts, run.tokens, strict=True)
            for p in range(start, start + len(tokens))
        ]
        held = [pages for pages, tokens in zip(run.pages, run.tokens, strict=True) for _ in tokens]
        size = cache.page_size
        slots = [pages[p // size] * size + p % size for pages, p in zip(held, positions, strict=True)]
        counts = [len(tokens) for tokens in run.tokens]
        lengths = [start + count for start, count in zip(run.starts, counts, strict=True)]
        bounds_q, bounds_k = ([0, *accumulate(each)] for each in (counts, lengths))
        most = max(map(len, run.pages))
        tables = [[*pages, *[0] * (most - len(pages))] for pages in run.pages]
        wanted = [begin + row for begin, rows in zip(bounds_q, run.rows, strict=False) for row in rows]
        flat = [token for tokens in run.tokens for token in tokens]
        narrow = (bounds_q, bounds_k, lengths, tables)
        wide = (slots, flat, positions, wanted, run.slots or [])
        starts, all_starts, reached, pages, targets, ids, places, rows, states = upload(
            [
                *(torch.tensor(values, dtype=torch.int32) for values in narrow),
                *(torch.tensor(values, dtype=torch.int64) for values in wide),
            ],
            self.device,
        )
        metadata = self.strategy.metadata(
            is_prefill=run.prefilling,
            cu_seqlens_q=starts,
            cu_seqlens_k=all_starts,
            max_seqlen_q=max(counts),
            max_seqlen_k=max(lengths),
            slot_mapping=targets,
            context_lens=reached,
            page_tables=pages,
            page_size=size,
            query_starts=bounds_q,
            lengths=lengths,
            state_slots=None if run.slots is None else states,
            **self.strategy.step_settings,
        )
        first = [bound - start for bound, start in zip(bounds_q, run.starts, strict=False)]
        scored = [
            (number, range(before + span.start, before + span.stop))
            for number, (span, before) in enumerate(zip(run.scored, first, strict=True))
            if span
        ]
        names = [name for name, count in zip(run.adapters, counts, strict=True) for _ in range(count)]
        return self._forward(ids, places, metadata, names, (rows, wanted), run.adapters, scored, requests)

    def _decode(self, requests: list[Request], cache: PagedKVCache) -> Tensor | None:
        """Run as many tokens of each request by replaying a recorded step, and return the rows that are wanted.

        Returns None where this model, or a batch of this size, cannot be replayed, or where requests run fewer tokens
        than others.  On a CPU a step with adapters is not: eagerly each is applied to its own rows alone.
        """
        width = len(requests[0].running_sequence)
        if any(len(request.running_sequence) != width for request in requests):
            return None
        if not self._still_stands(cache):
            return None
        rows = len(requests) if self.capture is None else bucket_of(len(requests), self._exact)
        if rows is None or self.eager_reason is not None:
            return None
        adapters: tuple[str, ...] = ()
        if any(request.adapter is not None for request in requests):
            adapters = tuple(sorted(loaded_adapters(self.model)))
            if self.capture is None or any(r.adapter not in (None, *adapters) for r in requests):
                return None
        key: tuple[int | str, ...] = (rows, width, torch.get_num_threads(), *adapters)
        batch = self._decoding.pop(key, None)
        if batch is None:
            longest = min(self.max_length, cache.num_pages * cache.page_size)
            columns = cache.pages_for(longest)
            batch = DecodingBatch(
                rows,
                columns,
                cache.page_size,
                longest,
                self.device,
                has_states=self.states is not None,
                width=width,
                strategy=self.strategy,
                memory=self._memory,
                adapters=adapters,
            )
            size = 0 if self.states is None else rows * self.states.bytes_each
            if self.capture is None and size > MAX_COPIED_BYTES:
                batch.refused = f"the states of its requests take {size >> 20} MiB"
        self._decoding[key] = batch
        if batch.refused is not None:
            return None
        batch.fill(requests)
        records = batch.replay is None and (self.capture is not None or batch.steps == RECORDED_STEP - 1)
        if records and self._watch is None:
            RevisedModule.recorders.add(self)
            self._watch = Watch(model=self.model)
        rewind = self._rewind(requests) if self.capture is None and not batch.trusted else None
        try:
            logits = batch.run(
                lambda: self._forward_decoding(batch),
                self.capture,
                rewind,
                lambda: self._check_recorded(batch),
            )
            if not records and batch.trusted:
                self._stale = 0
        except NotRepeatable as reason:
            if rewind is not None:
                rewind()
            batch.replay, batch.refused = None, str(reason)
            if isinstance(reason, CaptureFailed):
                self._note_failure(batch.refused)
                # What the attempt itself has changed does not make it worth another.
                self.notice()
                self._decoding_of = self._made_for(cache)
                self._decoding[key] = batch
            return None
        while self.capture is None and len(self._decoding) > 1 and self._keeps_too_much():
            del self._decoding[next(iter(self._decoding))]
        wanted = _wanted(requests, range(0, len(requests) * width, width))
        if len(wanted) == len(requests) * width:
            return logits[: len(wanted)]
        return logits[upload([torch.tensor(wanted)], self.device)[0]]

    def _check_recorded(self, batch: DecodingBatch) -> None:
        """Raise NotRepeatable if recording the batch's step has changed the model."""
        assert self._watch is not None
        self._watch.hold(batch.outside)
        if self._watch.changed():
            raise NotRepeatable("the step changes attributes of the model")

    def _note_failure(self, reason: str) -> None:
        """Say once why decoding steps are not captured."""
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("decoding is slower, without a captured graph: %s", reason)

    def forget(self) -> None:
        """Drop all that is recorded, and with it the memory of weights that it read."""
        self._decoding.clear()
        self._watch = None

    def notice(self) -> None:
        """Count a change of the model that nobody has counted, so that no recorded step or cached page outlives it."""
        if self._watch is not None and self._watch.changed():
            RevisedModule.revision += 1
            self._stale += 1
            self._patience = min(1 << self._stale, MAX_PATIENCE)
            self.forget()

    def _still_stands(self, cache: PagedKVCache) -> bool:
        """Drop what is recorded if it is stale.  Returns whether this step can be one that is recorded or replayed."""
        if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
            # Somebody watches torch's operations, or gives others in their place.
            return False
        self.notice()
        made_for = self._made_for(cache)
        if made_for != self._decoding_of or self.eager_reason == HOOKED:
            self._decoding_of = made_for
            self.forget()
            why_not = why_not_recorded if self.device.type == "cpu" else why_not_captured
            self.eager_reason = self.model.why_not_repeated or why_not(self.model)
            self._exact = self.capture is not None and scales_span_rows(self.model)
        self._patience = max(0, self._patience - 1)
        return not self._patience

    def _made_for(self, cache: PagedKVCache) -> tuple[Any, ...]:
        """Return what must stay as it is for all that is recorded."""
        return (
            *(cache, self.states, self.capture, RevisedModule.revision, RemovableHandle.next_id),
            *(torch.get_default_dtype(), torch.is_autocast_enabled(self.device.type)),
        )

    def _keeps_too_much(self) -> bool:
        kept = self._decoding.values()
        return len(kept) > MAX_TAPES or sum(batch.bytes for batch in kept) > MAX_TAPE_BYTES

    def _rewind(self, requests: list[Request]) -> Callable[[], None] | None:
        """Return what puts the states of these requests back to what they are now; None: there are none."""
        states = self.states
        if states is None:
            return None
        slots = self._slots(requests)
        saved = states.save(slots)
        return lambda: states.restore(slots, saved)

    @staticmethod
    def _slots(requests: list[Request]) -> list[int]:
        slots = [request.state_slot for request in requests if request.state_slot is not None]
        assert len(slots) == len(requests)
        return slots

    @torch.no_grad()
    def _forward_decoding(self, batch: DecodingBatch) -> Tensor:
        set_fetch_fn_for_attn_metadata(_metadata.get)
        token = _metadata.set(batch.step)
        try:
            with use_adapters(batch.adapter_batch()):
                logits = self.model.compute_logits(self.model(batch.ids, batch.positions), gather_all=True)
        finally:
            _metadata.reset(token)
            batch.step.restart()  # what its layers shared makes room
        assert logits is not None
        return logits

    def _int32(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        metadata: AttnMetaDataBase,
        names: Sequence[str | None],
        wanted: tuple[Tensor, Sequence[int]] | None = None,
        adapters: Sequence[str | None] = (),
        scored: Sequence[tuple[int, range]] = (),
        requests: Sequence[Request] = (),
    ) -> Tensor:
        """Run the tokens `ids` at `positions`, both [T], and compute logits.

        names: each token's adapter.  wanted: the tokens whose logits are wanted, on the device and here; None: all.
        adapters: each request's.  scored: the numbers of requests whose logits `score_prompts` gets, and after which of
        the tokens; nobody gets them without the requests.
        """
        wide = AdapterBatch.of(names, self.device)
        narrow = wide if wanted is None else AdapterBatch.of([names[row] for row in wanted[1]], self.device)
        # Each time: another runner may have installed its own.
        set_fetch_fn_for_attn_metadata(_metadata.get)
        token = _metadata.set(metadata)
        try:
            with use_adapters(wide):
                hidden = self.model(ids, positions)
            self._score(scored, hidden, adapters, requests)
            if wanted is not None:
                rows = wanted[0]
                if not len(rows):
                    return torch.empty((0, self.model.config.size("vocab_size")), device=self.device)
                hidden = hidden[rows]
            with use_adapters(narrow):
                logits = self.model.compute_logits(hidden, gather_all=True)
        finally:
            _metadata.reset(token)
        assert logits is not None
        return logits

    def _score(
        self,
        scored: Sequence[tuple[int, range]],
        hidden: Tensor,
        adapters: Sequence[str | None],
        requests: Sequence[Request],
    ) -> None:
        """Hand the logits after tokens of prompts over, a few at a time, whosever they are.  hidden: [T, H]."""
        owners = [number for number, places in scored for _ in places]
        if not owners:
            return
        (rows,) = upload([torch.tensor([place for _, places in scored for place in places])], self.device)
        for start in range(0, len(owners), SCORED_ROWS):
            part = owners[start : start + SCORED_ROWS]
            with use_adapters(AdapterBatch.of([adapters[number] for number in part], self.device)):
                logits = self.model.compute_logits(hidden[rows[start : start + SCORED_ROWS]], gather_all=True)
            assert logits is not None
            if requests and self.score_prompts is not None:
                self.score_prompts([requests[number] for number in part], logits)


def _wanted(requests: Sequence[Request], starts: Sequence[int]) -> list[int]:
    """Return the rows of a step whose logits are wanted.  starts: where each request's tokens begin."""
    return [start + row for request, start in zip(requests, starts, strict=False) for row in request.rows]
