"""Decoding steps as CUDA graphs, captured once for each of a few batch sizes (buckets) and replayed over new numbers.

Where a bucket has more rows than there are requests, the spare rows store nothing (slot -1) and see one position; their
logits are dropped. A model whose kernels look at the host within a step cannot be captured, and runs eagerly:
`why_not_captured` says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pymllm.engine.watch import is_hooked
from pymllm.layers.held import Binder, weight_holders

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)

# Runs before the capture: they compile kernels and choose algorithms, which a capture must not do.
WARM_UPS = 2

# From what runs a step to what replays it; a replay returns the step's result, which stands until the next one.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_of(requests: int) -> int | None:
    """Return the rows of the smallest bucket that holds so many requests, or None if every one is too small."""
    return next((size for size in BUCKETS if size >= requests), None)


def capture_cuda_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Warm up on a stream of its own, then capture.  Returns what replays `run`, into the same tensor each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # torch's own is of the first GPU that captured
        result = run()

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
