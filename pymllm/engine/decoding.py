"""Steps in which all requests run as many tokens: tensors that stay where they are, so that a step can be replayed.

A CPU replays a tape (`tape.py`), a GPU a captured graph (`graphs.py`); `Runner` treats both alike.
"""

# V vocabulary

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymllm.engine.graphs import Capture
from pymllm.engine.request import Request
from pymllm.engine.states import NOBODY
from pymllm.engine.strategies import Autoregressive, DecodingStrategy
from pymllm.engine.tape import NotRepeatable, record, repeated
from pymllm.engine.tape_memory import StepMemory
from pymllm.kernels.copies import Staged
from pymllm.layers.lora import AdapterBatch

# Which step of a batch is recorded: a batch of the same size has then come twice before.
RECORDED_STEP = 3


class CaptureFailed(NotRepeatable):
    """The failure of a capture, which would fail again."""


class DecodingBatch:
    """The tensors of a step of `size` requests of `width` tokens each, filled anew for each step.

    columns: how many pages a request may have.  max_length: how many tokens it may have.
    has_states: whether layers keep states of requests.
    adapters: the names of those that its requests may have; (): all have the layers' active ones.
    replay: runs the recorded step over what the tensors hold now; None until a step is recorded.
    trusted: whether a tape has been tried on a second step.  steps: how often the batch was run without a trusted tape.
    bytes: what its tensors and its tape take.  refused: why its step cannot be replayed.
    memory: of all tapes; None: a tape has its own.  outside: the tensors that its tape uses and that are not its own.
    """

    def __init__(
        self,
        size: int,
        columns: int,
        page_size: int,
        max_length: int,
        device: torch.device,
        has_states: bool = False,
        width: int = 1,
        strategy: DecodingStrategy | None = None,
        memory: StepMemory | None = None,
        adapters: Sequence[str] = (),
    ) -> None:
        strategy = strategy or Autoregressive()
        # `fill` writes through NumPy, whose assignments cost a tenth of torch's; on a CPU these are the step's tensors.
        self._numbers = Staged(
            (
                ((3, size * width), torch.int64),
                ((size,), torch.int64),
                ((2, size + 1), torch.int32),
                ((size * width,), torch.int64),
            ),
            device,
        )
        self._names: tuple[str | None, ...] = (None, *adapters) if adapters else ()
        self._page_tables = Staged((((size, columns), torch.int32),), device)
        self._tokens, self._states, self._lengths, self._places = self._numbers.here
        (self._pages,) = self._page_tables.here
        tokens, states, lengths, self._adapters = self._numbers.there
        (pages,) = self._page_tables.there
        self.ids, self.positions, slots = tokens
        self._width = width
        step_of = repeated(strategy.metadata)  # type: ignore[arg-type]
        self.step = step_of(
            cu_seqlens_q=torch.arange(0, size * width + 1, width, dtype=torch.int32, device=device),
            cu_seqlens_k=lengths[1],
            max_seqlen_q=width,
            max_seqlen_k=max_length,
            slot_mapping=slots,
            context_lens=lengths[0, :size],
            page_tables=pages,
            page_size=page_size,
            state_slots=states if has_states else None,
            **strategy.step_settings,
        )
        self.replay: Callable[[], Tensor] | None = None
        self.trusted, self.steps = False, 0
        self.bytes = self._numbers.nbytes + self._page_tables.nbytes
        self.memory, self.outside = memory, list[Tensor]()
        self.refused: str | None = None
        # Whose pages each row holds: the request, how often it had lost its pages, and how many they are. A request
        # that has ended is not kept for that, nor what the traceback of its error has.
        self._rows: list[tuple[weakref.ref[Request], int, int] | None] = [None] * size

    def fill(self, requests: list[Request]) -> None:
        """Write the runs of these requests; rows that no request has store nothing of anyone's."""
        size, rows, width = self.step.page_size, len(self._rows), self._width
        self._numbers.open()
        first = [request.computed for request in requests]
        spare = rows - len(requests)
        if width == 1:
            slots = [r.pages[p // size] * size + p % size for r, p in zip(requests, first, strict=True)]
            self._tokens[0] = [request.running_sequence[0] for request in requests] + [0] * spare
            self._tokens[1] = first + [0] * spare
        else:
            places = [place for start in first for place in range(start, start + width)]
            owners = [request for request in requests for _ in range(width)]
            slots = [r.pages[p // size] * size + p % size for r, p in zip(owners, places, strict=True)]
            tokens = [token for request in requests for token in request.running_sequence]
            self._tokens[0] = tokens + [0] * spare * width
            self._tokens[1] = places + list(range(width)) * spare
        self._tokens[2] = slots + [-1] * spare * width
        if self.step.state_slots is not None:
            self._states[:] = [request.state_slot for request in requests] + [NOBODY] * spare
        self._lengths[0, :rows] = self._tokens[1, width - 1 :: width] + 1
        self._lengths[0, :rows].cumsum(out=self._lengths[1, 1:])
        if self._names:
            places = [self._names.index(request.adapter) for request in requests for _ in range(width)]
            self._places[:] = places + [-1] * spare * width
        self._numbers.send()
        self._fill_pages(requests)

    def adapter_batch(self) -> AdapterBatch | None:
        """Return the adapters of the rows, as the tensors have them; None: the active ones."""
        return AdapterBatch.masked(self._names, self._adapters) if self._names else None

    def _fill_pages(self, requests: list[Request]) -> None:
        """Write the pages of these requests, where they are others than before."""
        each = [(weakref.ref(request), request.preemptions, len(request.pages)) for request in requests]
        changed = [row for row, held in enumerate(each) if self._rows[row] != held]
        if not changed:
            return
        self._page_tables.open()
        for row in changed:
            self._pages[row, : each[row][2]] = requests[row].pages
            self._rows[row] = each[row]
        self._page_tables.send(range(changed[0], changed[-1] + 1))

    def run(
        self,
        forward: Callable[[], Tensor],
        capture: Capture | None,
        rewind: Callable[[], None] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run the filled batch, by `forward` until its step can be replayed.  Returns [size * width, V].

        capture: captures the first step (on a GPU). Without it a tape is recorded at the third step and tried at the
        fourth. Raises NotRepeatable if the step has what a tape cannot have, CaptureFailed if it cannot be captured.
        rewind: puts the requests' states back, so that the step can run again; for tapes alone, where there are states.
        check: is called once the step is recorded, and raises NotRepeatable where that is of no use.
        """
        if self.replay is not None and self.trusted:
            return self.replay()
        if capture is not None:
            replay = self._captured(forward, capture)
            check()
            self.replay, self.trusted = replay, True
            return self.replay()
        self.steps += 1
        logits = forward()
        if self.replay is not None:
            self.trusted = True
            if rewind is not None:
                rewind()
            if not torch.equal(self.replay(), logits):
                raise NotRepeatable("played back on another step, it gives other logits")
        elif self.steps == RECORDED_STEP:
            tape = record(forward, logits, rewind, self.memory)
            mine = {one.region.untyped_storage().data_ptr() for one in (self._numbers, self._page_tables)}
            self.outside = [one for one in tape.outside if one.untyped_storage().data_ptr() not in mine]
            check()
            self.replay, self.bytes = tape.play, self.bytes + tape.bytes
        return logits

    def _captured(self, forward: Callable[[], Tensor], capture: Capture) -> Callable[[], Tensor]:
        """Capture the step over rows of nobody: what runs to warm up leaves the requests' keys and states alone.

        Raises CaptureFailed, with everything as it was, if that fails: whether the step itself is to blame, running it
        eagerly tells.
        """
        targets = [slots for slots in (self.step.slot_mapping, self.step.state_slots) if slots is not None]
        own = [slots.clone() for slots in targets]
        try:
            for slots in targets:
                slots.fill_(NOBODY)
            return capture(forward)
        except Exception as error:
            raise CaptureFailed(f"its capture failed: {type(error).__name__}: {error}") from error
        finally:
            for slots, kept in zip(targets, own, strict=True):
                slots.copy_(kept)
