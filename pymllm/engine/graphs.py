"""Decoding steps as CUDA graphs: captured once for each of a few batch sizes, replayed over tensors filled anew.

Between buckets, rows that no request has store nothing (slot -1) and see one position; their logits are dropped. A
model whose kernels look at the host within a step cannot be captured, and is run eagerly: `why_not_captured` says why.
"""

# R requests, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pymllm.engine.decoding import DecodingBatch
from pymllm.engine.request import Request
from pymllm.layers.held import Binder, weight_holders

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
WARM_UPS = 2  # runs before the capture: they compile kernels and choose algorithms, which a capture must not

Captured = tuple[Callable[[], None], Tensor]


@dataclass(frozen=True)
class DecodingGraph:
    """replay: run the captured step.  logits: [bucket, V], where it leaves them."""

    batch: DecodingBatch
    replay: Callable[[], None]
    logits: Tensor


class DecodingGraphs:
    """make: a batch of so many rows.  forward: one eager step over a batch.  capture: how a step becomes replayable."""

    def __init__(
        self,
        make: Callable[[int], DecodingBatch],
        forward: Callable[[DecodingBatch], Tensor],
        capture: Callable[[Callable[[], Tensor]], Captured] | None = None,
    ) -> None:
        self.make, self.forward, self.capture = make, forward, capture or capture_cuda_graph
        self._graphs: dict[int, DecodingGraph] = {}

    def step(self, requests: list[Request]) -> Tensor | None:
        """One token each.  Returns [R, V], good until the next step; None for more requests than any graph has."""
        size = next((size for size in BUCKETS if size >= len(requests)), None)
        if size is None:
            return None
        graph = self._graphs.get(size)
        if graph is None:
            batch = self.make(size)
            batch.fill(requests)
            replay, logits = self.capture(lambda: self.forward(batch))
            graph = self._graphs[size] = DecodingGraph(batch, replay, logits)
        graph.batch.fill(requests)
        graph.replay()
        return graph.logits[: len(requests)]

    def forget(self) -> None:
        """The model or its cache has changed: capture again."""
        self._graphs.clear()


def capture_cuda_graph(run: Callable[[], Tensor]) -> Captured:
    """Warm up on a stream of its own, then capture.  Returns how to replay, and where the result will be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


SEE_THE_STEP = (
    "attention",
    "kv_store",
    "experts",
)  # operations whose kernels say whether they are `capturable`


def why_not_captured(model: nn.Module, binder: Binder | None = None) -> str | None:
    """Return the first thing that keeps a decoding step of `model` from being captured, or None.

    binder: plans the kernels of a model that is not loaded.
    """
    holders = dict(weight_holders(model))
    for name, module in model.named_modules():
        for selection in holders[name].selections(binder) if name in holders else ():
            kernel = selection.kernel
            if selection.operation in SEE_THE_STEP and not getattr(kernel, "capturable", False):
                return f"{name} runs {kernel.name}, which looks at the host within a step"
        if getattr(getattr(module, "parallel", None), "size", 1) > 1:
            return f"{name} is divided over ranks"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
    return None
