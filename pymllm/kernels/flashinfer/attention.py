"""FlashInfer's paged attention for steps that read prompts, where the package is installed.

FlashInfer plans a step on the host before it runs, and a CUDA graph cannot hold that. Steps in which every request
brings one token are therefore left to `TritonGroupedAttention`. So are the steps that FlashInfer has no form for: those
without pages, and those of strategies that decode blocks. Nothing of FlashInfer is imported before a step needs it.
"""

# R requests, T tokens of this step, H query heads, Hkv key heads, D head size, P page size

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymllm.errors import KernelError, install_command
from pymllm.kernels.attention import AttentionProblem, AttentionStep, PagedKV
from pymllm.kernels.triton.attention import TritonGroupedAttention

HEAD_SIZES = (64, 128, 256)  # those that FlashInfer compiles for every architecture from sm80 on
WORKSPACE_BYTES = 128 << 20  # what its documentation asks for


@dataclass(frozen=True)
class Requests:
    """A step's requests that bring tokens, in the form that FlashInfer plans with.

    query_starts: [R + 1], where the tokens of each request begin.  page_starts: [R + 1], where the pages of each begin
    in `pages`, [pages].  last_lengths: [R], tokens in the last page of each, 1 to P.
    All are int32, and all but `pages` are on the host.
    """

    query_starts: Tensor
    page_starts: Tensor
    pages: Tensor
    last_lengths: Tensor


class FlashInferAttention:
    """Attention over prompts by FlashInfer's BatchPrefillWithPagedKVCacheWrapper; decoding is left to Triton."""

    name = "flashinfer"
    device_type = "cuda"  # the only one it runs on
    capturable = True  # what a graph holds is decoding, which is Triton's

    def __init__(self) -> None:
        self.decoding = TritonGroupedAttention()
        self.wrappers: dict[AttentionProblem, Any] = {}

    def why_not(self, problem: AttentionProblem) -> str | None:
        architecture = problem.device.architecture
        if problem.device.type != "cuda" or architecture is None or not architecture.is_nvidia:
            return "needs an NVIDIA GPU"
        if problem.dtype not in (torch.float16, torch.bfloat16):
            return f"computes with float16 or bfloat16, not {problem.dtype}"
        if not problem.kv.keeps(problem.dtype):
            return f"reads caches of the queries' dtype, not {problem.kv}"
        if problem.head_dim not in HEAD_SIZES or problem.value_head_dim != problem.head_dim:
            heads = f"{problem.head_dim} and {problem.value_head_dim}"
            return f"takes heads of {', '.join(map(str, HEAD_SIZES))}, keys' and values' alike, not {heads}"
        if problem.sinks:
            return "has no attention sinks"
        if problem.bidirectional:
            return "sees the positions up to a query's own, not those after it"
        if problem.block_causal:
            return "has no blocks that see themselves"
        why = self.decoding.why_not(problem)
        return (
            _why_not_installed() if why is None else f"leaves decoding to {self.decoding.name}, which {why}"
        )

    reads_pages = True  # not k and v, where there is a cache

    def run(
        self,
        problem: AttentionProblem,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: AttentionStep,
        cache: PagedKV | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend as `AttentionKernel.run` says."""
        if cache is None or step.max_seqlen_q <= 1 or not step.causal:
            return self.decoding.run(problem, q, k, v, step, cache, sinks)
        wrapper = step.once(("flashinfer", problem), lambda: self._plan(problem, step, q.device))
        return wrapper.run(q if q.is_contiguous() else q.contiguous(), (cache.k, cache.v))

    def _plan(self, problem: AttentionProblem, step: AttentionStep, device: torch.device) -> Any:
        """Plan this step with the problem's wrapper, and return the wrapper.

        The first time, FlashInfer compiles its kernel.  Raises KernelError if it cannot.
        """
        requests = step.once(("flashinfer requests", device), lambda: requests_of(step, device))
        try:
            wrapper = self.wrappers.get(problem)
            if wrapper is None:
                wrapper = _package().BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD")
                self.wrappers[problem] = wrapper
            wrapper.plan(
                requests.query_starts,
                requests.page_starts,
                requests.pages,
                requests.last_lengths,
                problem.num_heads,
                problem.num_kv_heads,
                problem.head_dim,
                step.page_size,
                causal=True,
                sm_scale=problem.scale,
                # FlashInfer counts the positions before a query's own; sliding_window counts its own too.
                window_left=-1 if problem.sliding_window is None else problem.sliding_window - 1,
                logits_soft_cap=problem.soft_cap,
                q_data_type=problem.dtype,
                kv_data_type=problem.dtype,
            )
        except RuntimeError as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KernelError(
                f"FlashInfer could not prepare its kernel: {said}",
                code="flashinfer",
                fix=f"Force another kernel: --kernel attention={self.decoding.name}.",
            ) from error
        return wrapper


def requests_of(step: AttentionStep, device: torch.device) -> Requests:
    """Collect the requests of a step that bring tokens."""
    assert step.page_tables is not None
    bringing = [(row, *span) for row, span in enumerate(step.spans) if span[1] > span[0]]
    lengths = torch.tensor([length for _, _, _, length in bringing], dtype=torch.int32)
    counts = (lengths + step.page_size - 1) // step.page_size
    starts = torch.zeros(len(bringing) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    # Where the row of each begins in the flattened page tables.
    first = torch.tensor([row * step.page_tables.shape[1] for row, *_ in bringing])
    places = (first - starts[:-1]).repeat_interleave(counts) + torch.arange(int(starts[-1]))
    return Requests(
        torch.tensor([bringing[0][1], *(stop for _, _, stop, _ in bringing)], dtype=torch.int32),
        starts,
        step.page_tables.to(device).flatten()[places.to(device)].int(),
        (lengths - 1) % step.page_size + 1,
    )


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    """Make FlashInfer's room for partial sums, one a device: layers run one after the other, and share it."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.cache
def _package() -> Any:
    return importlib.import_module("flashinfer")


@functools.cache
def _why_not_installed() -> str | None:
    """Return why FlashInfer cannot be had here, or None.

    Its kernels come compiled in a package of their own, or nvcc compiles them.
    """
    if importlib.util.find_spec("flashinfer") is None:
        return f"needs the package flashinfer ({install_command('flashinfer')})"
    if importlib.util.find_spec("flashinfer_jit_cache") is None:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            return "needs nvcc to compile its kernels, or the package flashinfer-jit-cache"
    return None
