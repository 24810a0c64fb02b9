"""Decoding steps as CUDA graphs, captured once for each of a few batch sizes (buckets) and replayed over new numbers.

Where a bucket has more rows than there are requests, the spare rows store nothing (slot -1) and see one position; their
logits are dropped. Where a scale of activations is that of all rows, there are no spare ones (`scales_span_rows`). A
model whose kernels look at the host within a step cannot be captured, and runs eagerly: `why_not_captured` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pymllm.engine.watch import is_hooked
from pymllm.kernels.capturing import captured
from pymllm.layers.held import Binder, weight_holders

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)

# Runs before the capture: they compile kernels and choose algorithms, which a capture must not do.
WARM_UPS = 2

# From what runs a step to what replays it; a replay returns the step's result, which stands until the next one.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_of(requests: int, exact: bool = False) -> int | None:
    """Return the rows of the smallest bucket that holds so many requests, or None if every one is too small.

    exact: without spare rows, so that there are as many buckets as numbers of requests.
    """
    return next((size for size in graph_sizes(exact) if size >= requests), None)


def graph_sizes(exact: bool = False) -> Sequence[int]:
    """Return the rows of every graph that steps of one width may have.  exact: as for `bucket_of`."""
    return range(1, BUCKETS[-1] + 1) if exact else BUCKETS


def scales_span_rows(model: nn.Module, binder: Binder | None = None) -> bool:
    """Tell whether a scale of activations follows from all rows of a step: spare ones would change the others.

    binder: plans the kernels of a model that is not loaded.
    """
    selections = (selection for _, holder in weight_holders(model) for selection in holder.selections(binder))
    problems = (
        problem
        for selection in selections
        for problem in (
            selection.problem.products().values()
            if selection.operation == "experts"
            else (selection.problem,)
        )
    )
    weights = (getattr(problem, "weight", None) for problem in problems)
    return any(getattr(weight, "activations", "").startswith("tensor") for weight in weights)


def capture_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Warm up on a stream of its own, then capture.  Returns what replays `run`, into the same tensor each time.

    If either fails, its error is raised, on the stream that was current before.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
    finally:
        current.wait_stream(stream)
    graph, result = captured(run, stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# Operations whose kernels say whether they are `capturable`.
SEE_THE_STEP = ("attention", "kv_store", "experts", "gated_delta", "mamba2_scan", "causal_conv")


def why_not_captured(model: nn.Module, binder: Binder | None = None) -> str | None:
    """Return the first thing that keeps a decoding step of `model` from being captured, or None.

    binder: plans the kernels of a model that is not loaded.
    """
    holders = dict(weight_holders(model))
    for name, module in model.named_modules():
        if name in holders and holders[name].state_bytes() and not holders[name].copies_states:
            return f"{name} keeps states that are no tensors"
        for selection in holders[name].selections(binder) if name in holders else ():
            kernel = selection.kernel
            if selection.operation in SEE_THE_STEP and not getattr(kernel, "capturable", False):
                return f"{name} runs {kernel.name}, which looks at the host within a step"
        if getattr(getattr(module, "parallel", None), "size", 1) > 1:
            return f"{name} is divided over ranks"
        if is_hooked(module):
            return f"{name} has hooks"
    return None
