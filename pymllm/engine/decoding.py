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
        self.ids, self.positions, slots = torch.zeros((3, size), dtype=torch.int64, device=device)
        lengths = torch.zeros(size, dtype=torch.int32, device=device)
        self.step = RepeatedStep(
            cu_seqlens_q=torch.arange(size + 1, dtype=torch.int32, device=device),
            cu_seqlens_k=torch.zeros(size + 1, dtype=torch.int32, device=device),
            max_seqlen_q=1,
            max_seqlen_k=max_length,
            slot_mapping=slots,
            context_lens=lengths,
            page_tables=torch.zeros((size, columns), dtype=torch.int32, device=device),
            page_size=page_size,
        )
        self.tape: Tape | None = None
        self.trusted, self.steps = False, 0
        self.refused: str | None = None
        # Whose pages each row holds: how often they were taken before, and how many.
        self._rows: list[tuple[Request, int, int] | None] = [None] * size

    def fill(self, requests: list[Request]) -> None:
        """Write this step's tokens, positions, slots and pages; rows that no request has store nothing."""
        step, size = self.step, self.step.page_size
        last = [request.length - 1 for request in requests]
        slots = [r.pages[p // size] * size + p % size for r, p in zip(requests, last, strict=True)]
        spare = len(self._rows) - len(requests)
        tokens = [request.last_token for request in requests]
        numbers = torch.tensor([tokens + [0] * spare, last + [0] * spare, slots + [-1] * spare])
        assert (
            step.slot_mapping is not None and step.context_lens is not None and step.page_tables is not None
        )
        assert step.cu_seqlens_k is not None
        for tensor, row in zip((self.ids, self.positions, step.slot_mapping), numbers, strict=True):
            tensor.copy_(row)
        step.context_lens.copy_(numbers[1] + 1)
        step.cu_seqlens_k[1:] = step.context_lens.cumsum(0)
        for row, request in enumerate(requests):
            held = (request, request.preemptions, len(request.pages))
            if self._rows[row] != held:
                step.page_tables[row, : held[2]] = torch.tensor(request.pages, dtype=torch.int32)
                self._rows[row] = held

    def forget(self) -> None:
        """The model has changed: record again."""
        self.tape, self.trusted, self.refused, self.steps = None, False, None, 0
