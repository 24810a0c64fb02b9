"""Steps in which every request brings one token: tensors that stay where they are, and the tape that plays them."""

# R requests

from __future__ import annotations

import torch

from pymllm.engine.request import Request
from pymllm.engine.tape import RepeatedStep, Tape


class DecodingBatch:
    """The tensors of `size` requests, filled anew for each step.

    columns: pages that a request may have.  max_length: tokens that one may have.
    tape: None until it is recorded.  trusted: whether the tape has been tried on a second step.
    refused: why there will be none.  steps: how often the batch was run without one.
    """

    def __init__(
        self, size: int, columns: int, page_size: int, max_length: int, device: torch.device
    ) -> None:
        # Filled here through NumPy, whose assignments cost a tenth of torch's; on a CPU they are the step's tensors.
        tokens = torch.zeros((3, size), dtype=torch.int64)
        lengths = torch.zeros((2, size + 1), dtype=torch.int32)
        pages = torch.zeros((size, columns), dtype=torch.int32)
        self._tokens, self._lengths, self._pages = tokens.numpy(), lengths.numpy(), pages.numpy()
        self._filled = [(there, here) for here in (tokens, lengths, pages) for there in (here.to(device),)]
        (tokens, _), (lengths, _), (pages, _) = self._filled
        self.ids, self.positions, slots = tokens
        self.step = RepeatedStep(
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=device),
            cu_seqlens_k=lengths[1],
            max_seqlen_q=1,
            max_seqlen_k=max_length,
            slot_mapping=slots,
            context_lens=lengths[0, :size],
            page_tables=pages,
            page_size=page_size,
        )
        self.tape: Tape | None = None
        self.trusted, self.steps = False, 0
        self.refused: str | None = None
        # Whose pages each row holds: how often they were taken before, and how many.
        self._rows: list[tuple[Request, int, int] | None] = [None] * size

    def fill(self, requests: list[Request]) -> None:
        """Write this step's tokens, positions, slots and pages; rows that no request has store nothing."""
        size, rows = self.step.page_size, len(self._rows)
        last = [request.length - 1 for request in requests]
        slots = [r.pages[p // size] * size + p % size for r, p in zip(requests, last, strict=True)]
        spare = rows - len(requests)
        self._tokens[0] = [request.last_token for request in requests] + [0] * spare
        self._tokens[1] = last + [0] * spare
        self._tokens[2] = slots + [-1] * spare
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

    def forget(self) -> None:
        """The model has changed: record again."""
        self.tape, self.trusted, self.refused, self.steps = None, False, None, 0
