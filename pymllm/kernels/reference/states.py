"""The states of a step's requests, for kernels that are torch operations: gathered, and put back."""

# R requests, T tokens of this step, N requests alike, L new tokens of each, S slots

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymllm.kernels.attention import AttentionStep


@dataclass(frozen=True)
class Alike:
    """Requests with the same number of new tokens, which operations take together.

    rows: [N, L], their tokens in the step.  continued: which of the N have a state, and slots: where that lies.
    kept: which of the N keep a state after the step, and kept_slots: where.
    """

    rows: Tensor
    continued: Tensor
    slots: Tensor
    kept: Tensor
    kept_slots: Tensor

    def read(self, state: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return the state that each request begins with, [N, *shape] float32."""
        begun = torch.zeros((self.rows.shape[0], *shape), device=self.rows.device)
        if state is not None:
            begun[self.continued] = state[self.slots]
        return begun

    def keep(self, state: Tensor | None, ended: Tensor) -> None:
        """Put the states that requests end with, [N, *shape], into their slots."""
        if state is not None:
            state[self.kept_slots] = ended[self.kept].float()


def alike_requests(step: AttentionStep) -> list[Alike]:
    """Sort the requests of a step by their number of new tokens, once a step; those without any are left out."""
    sources = (step.cu_seqlens_q, step.context_lens, step.state_slots)
    return step.once("requests alike", lambda: _sort(step), *sources)


def _sort(step: AttentionStep) -> list[Alike]:
    starts = step.cu_seqlens_q
    assert starts is not None
    by_count: dict[int, list[int]] = {}
    for request, (begin, end, _) in enumerate(step.spans):
        if end > begin:
            by_count.setdefault(end - begin, []).append(request)
    none = [-1] * step.num_reqs
    slots = none if step.state_slots is None else step.state_slots.tolist()

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=starts.device)

    found = []
    for count, requests in by_count.items():
        begins = numbers([step.spans[request][0] for request in requests])
        kept = [at for at, request in enumerate(requests) if slots[request] >= 0]
        continued = [at for at in kept if step.spans[requests[at]][2] > count]
        found.append(
            Alike(
                rows=begins[:, None] + torch.arange(count, device=starts.device),
                continued=numbers(continued),
                slots=numbers([slots[requests[at]] for at in continued]),
                kept=numbers(kept),
                kept_slots=numbers([slots[requests[at]] for at in kept]),
            )
        )
    return found
