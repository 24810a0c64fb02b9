"""Steps in which every request brings one token: tensors that stay where they are, so that a step can be replayed.

A CPU replays a tape (`tape.py`), a GPU a captured graph (`graphs.py`); `Runner` treats both alike.
"""

# V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pymllm.engine.graphs import Capture
from pymllm.engine.request import Request
from pymllm.engine.tape import NotRepeatable, RepeatedStep, record

# Which step of a batch is recorded: a batch of the same size has then come twice before.
RECORDED_STEP = 3


class DecodingBatch:
    """The tensors of a step of `size` requests, filled anew for each step.

    columns: how many pages a request may have.  max_length: how many tokens it may have.
    spare_state: the slot of states that rows without a request have; None: no layer keeps states.
    replay: runs the recorded step over what the tensors hold now; None until a step is recorded.
    trusted: whether a tape has been tried on a second step.  steps: how often the batch was run without a trusted tape.
    refused: why its step cannot be replayed.
    """

    def __init__(
        self,
        size: int,
        columns: int,
        page_size: int,
        max_length: int,
        device: torch.device,
        spare_state: int | None = None,
    ) -> None:
        self.spare_state = spare_state
        # `fill` writes through NumPy, whose assignments cost a tenth of torch's; on a CPU these are the step's tensors.
        tokens = torch.zeros((4, size), dtype=torch.int64)
        lengths = torch.zeros((2, size + 1), dtype=torch.int32)
        pages = torch.zeros((size, columns), dtype=torch.int32)
        self._tokens, self._lengths, self._pages = tokens.numpy(), lengths.numpy(), pages.numpy()
        self._filled = [(there, here) for here in (tokens, lengths, pages) for there in (here.to(device),)]
        (tokens, _), (lengths, _), (pages, _) = self._filled
        self.ids, self.positions, slots, states = tokens
        self.step = RepeatedStep(
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=device),
            cu_seqlens_k=lengths[1],
            max_seqlen_q=1,
            max_seqlen_k=max_length,
            slot_mapping=slots,
            context_lens=lengths[0, :size],
            page_tables=pages,
            page_size=page_size,
            state_slots=None if spare_state is None else states,
        )
        self.replay: Callable[[], Tensor] | None = None
        self.trusted, self.steps = False, 0
        self.refused: str | None = None
        # Whose pages each row holds: the request, how often it had lost its pages, and how many they are.
        self._rows: list[tuple[Request, int, int] | None] = [None] * size

    def fill(self, requests: list[Request]) -> None:
        """Write this step's tokens, positions, slots and pages; rows that no request has store nothing of anyone's."""
        size, rows = self.step.page_size, len(self._rows)
        last = [request.length - 1 for request in requests]
        slots = [r.pages[p // size] * size + p % size for r, p in zip(requests, last, strict=True)]
        spare = rows - len(requests)
        self._tokens[0] = [request.last_token for request in requests] + [0] * spare
        self._tokens[1] = last + [0] * spare
        self._tokens[2] = slots + [-1] * spare
        if self.spare_state is not None:
            self._tokens[3] = [request.state_slot for request in requests] + [self.spare_state] * spare
        self._lengths[0, :rows] = self._tokens[1] + 1
        self._lengths[0, :rows].cumsum(out=self._lengths[1, 1:])
        for row, request in enumerate(requests):
            held = (request, request.preemptions, len(request.pages))
            if self._rows[row] != held:
                self._pages[row, : held[2]] = request.pages
                self._rows[row] = held
        for there, here in self._filled:
            if there is not here:
                there.copy_(here)

    def run(
        self,
        forward: Callable[[], Tensor],
        capture: Capture | None,
        rewind: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run the filled batch, by `forward` until its step can be replayed.  Returns [size, V].

        capture: captures the first step (on a GPU). Without it a tape is recorded at the third step and tried at the
        fourth. Raises NotRepeatable if the step has what a tape cannot have.
        rewind: puts the requests' states back, so that the step can run again; for tapes alone, where there are states.
        """
        if self.replay is not None and self.trusted:
            return self.replay()
        if capture is not None:
            if self.step.state_slots is None or self.spare_state is None:
                self.replay = capture(forward)
            else:
                # What runs to warm up must leave the requests' states alone.
                own = self.step.state_slots.clone()
                self.step.state_slots.fill_(self.spare_state)
                self.replay = capture(forward)
                self.step.state_slots.copy_(own)
            self.trusted = True
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
            self.replay = (record(forward, logits, rewind) if rewind else record(forward, logits)).play
        return logits
